"""Sites: hook names and axes, and cells of sites. Which activations are patched, as plain names and numbers.

A :class:`Site` is a place in the model; a cell of a :class:`Grid` is the set of sites that one
patched run writes together. Nothing here knows tensors, models or prompts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

AXES = ("layer", "pos", "role", "head", "neuron", "dest_pos", "src_pos")
"""The axes a sweep can enumerate."""


@dataclass(frozen=True)
class Activation:
    """One kind of activation: its TransformerLens short name, hook name and axes."""

    name: str
    hook: str
    """Hook name with ``{layer}`` where the layer number goes."""
    axes: tuple[str, ...]
    """The tensor's patchable axes in order, after the batch axis."""

    def hook_point(self, layer: int) -> str:
        return self.hook.format(layer=layer)


ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name, f"blocks.{{layer}}.{hook}", axes)
    for name, hook, axes in (
        ("resid_pre", "hook_resid_pre", ("pos",)),
        ("resid_mid", "hook_resid_mid", ("pos",)),
        ("resid_post", "hook_resid_post", ("pos",)),
        ("attn_out", "hook_attn_out", ("pos",)),
        ("mlp_out", "hook_mlp_out", ("pos",)),
        ("z", "attn.hook_z", ("pos", "head")),
        ("q", "attn.hook_q", ("pos", "head")),
        ("k", "attn.hook_k", ("pos", "kv_head")),
        ("v", "attn.hook_v", ("pos", "kv_head")),
        ("result", "attn.hook_result", ("pos", "head")),
        ("pattern", "attn.hook_pattern", ("head", "dest_pos", "src_pos")),
        ("attn_scores", "attn.hook_attn_scores", ("head", "dest_pos", "src_pos")),
        ("pre", "mlp.hook_pre", ("pos", "neuron")),
        ("post", "mlp.hook_post", ("pos", "neuron")),
    )
}
"""The activations a sweep knows by short name."""

_BY_HOOK = {activation.hook: activation for activation in ACTIVATIONS.values()}
_LAYER = re.compile(r"^blocks\.(\d+)\.(.+)$")


@lru_cache(2**14)
def split_layer(hook_point: str) -> tuple[int | None, str]:
    """``"blocks.3.attn.hook_z"`` -> ``(3, "blocks.{layer}.attn.hook_z")``; no layer -> ``None``."""
    match = _LAYER.match(hook_point)
    if match is None:
        return None, hook_point
    return int(match[1]), f"blocks.{{layer}}.{match[2]}"


@lru_cache(2**14)
def activation_of(hook_point: str) -> Activation:
    """What a full hook name holds. Names outside ``ACTIVATIONS`` can be patched over ``pos`` only."""
    _, hook = split_layer(hook_point)
    return _BY_HOOK.get(hook) or Activation(hook_point, hook, ("pos",))


@dataclass(frozen=True)
class Site:
    """A place to patch: a hook point, narrowed on the axes that are given.

    ``None`` on an axis means that the whole axis is patched. ``pos`` is a token position (negative
    counts from the end of the prompt) or the name of a role, such as ``"S2"``, that the dataset
    places in each pair; so is ``dest_pos``. ``k`` and ``v`` count key/value heads.
    """

    hook_point: str
    pos: int | str | None = None
    head: int | None = None
    neuron: int | None = None
    dest_pos: int | str | None = None
    src_pos: int | None = None

    @property
    def layer(self) -> int | None:
        return split_layer(self.hook_point)[0]

    @property
    def activation(self) -> Activation:
        return activation_of(self.hook_point)

    def positions(self, length: int, roles: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The token positions written in a prompt of ``length`` tokens; ``None`` if it has no such
        position or role. For attention patterns these are destination positions."""
        pos = self.dest_pos if "dest_pos" in self.activation.axes else self.pos
        if self.src_pos is not None and not -length <= self.src_pos < length:
            return None
        if pos is None:
            return tuple(range(length))
        if isinstance(pos, str):
            return roles.get(pos)
        return (pos % length,) if -length <= pos < length else None

    @property
    def at_role(self) -> bool:
        """Whether its position depends on where a pair's roles lie."""
        return isinstance(self.pos, str) or isinstance(self.dest_pos, str)

    def counted_from_start(self, length: int) -> "Site":
        """The same site in a prompt of ``length`` tokens, its source position counted from the start."""
        if self.src_pos is None or self.src_pos >= 0:
            return self
        return replace(self, src_pos=self.src_pos + length)

    def __str__(self) -> str:
        axes = ("pos", "head", "neuron", "dest_pos", "src_pos")
        given = [f"{a}={v}" for a in axes if (v := getattr(self, a)) is not None]
        return f"{self.hook_point}[{', '.join(given)}]" if given else self.hook_point


Cell = tuple[Site, ...]
"""Sites that one patched run writes together; the empty cell does not exist on this model."""

Sites = Site | Cell
"""One site, or several that are patched together."""


def as_cell(sites: Sites) -> Cell:
    """One site, or a set of them, as a cell."""
    return (sites,) if isinstance(sites, Site) else tuple(sites)


def label(sites: Sites) -> str:
    """A site in few characters, ``z L9H6 END``, and sets of them joined by ``+``."""
    return " + ".join(map(_label, as_cell(sites)))


def _label(site: Site) -> str:
    layer = "" if site.layer is None else f"L{site.layer}"
    head = "" if site.head is None else f"H{site.head}"
    rest = [
        f"{axis} {at}"
        for axis in ("neuron", "dest_pos", "src_pos")
        if (at := getattr(site, axis)) is not None
    ]
    pos = site.pos if isinstance(site.pos, str) or site.pos is None else f"pos {site.pos}"
    return " ".join(part for part in (site.activation.name, layer + head, pos, *rest) if part)


@dataclass(frozen=True)
class ModelShape:
    """The counts a grid needs to know of a model."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_mlp: int | None
    hook_points: frozenset[str]


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep in row-major order over named axes."""

    axes: dict[str, tuple]
    cells: tuple[Cell, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.axes.values())

    def hook_points(self) -> list[str]:
        """Every hook point that some cell writes, sorted."""
        return sorted({site.hook_point for cell in self.cells for site in cell})
