"""Resuming: patched runs start at the layer and position where they first differ from the base run.

A wave travels down the layers. Its rows are ``[cell, pair]``, hold the positions from the wave's
start to the end of the prompt, and join at the layer of their own first site. What lies before the
start is the base run's and is shared by all rows of a pair. Waves of the same pairs travel abreast, so
that a layer's weights are laid out, and the base run's keys and values computed, once for all of them.
A metric that reads the last position needs the last layer at that position only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from patching.engine.place import numbers_on
from patching.engine.plan import Patch, Wave
from patching.engine.writes import LayerWrites, Writes, gather, inner
from patching.interventions import Custom, Replacement
from patching.models.attention import QKV, Past
from patching.models.block import Block
from patching.models.edit import NoEdit
from patching.sites import Site

Blocks = Callable[[int], Block]

CACHE_BYTES = 2**23
"""The widest activation of one step down a layer on a CPU."""
MANY = 1024
"""Positions of rows from which on laying out a layer's weights for them is worth its time."""

MID = ("z", "result", "attn_out", "resid_mid")
"""Activations that move the residual stream before the MLP by a vector known in advance."""
POST = ("post", "mlp_out", "resid_post")
"""Activations that move it behind the MLP by a vector known in advance."""


@dataclass(frozen=True)
class Base:
    """The base runs of some pairs, layer by layer, and what patches write into them."""

    resid_pre: list[Float[Tensor, "pair pos d_model"]]
    """One for each layer, on the layer's device, and the final residual stream last."""
    resid_mid: list[Float[Tensor, "pair pos d_model"]]
    live: dict[str, Tensor]
    """Activations of the base runs at the hook points that are patched."""
    values: dict[str, Tensor]
    """What the replacement writes there."""

    def of(self, places: Sequence[int]) -> "Base":
        """The same for some of the pairs."""
        if list(places) == list(range(len(self.resid_pre[0]))):
            return self

        def some(x: Tensor) -> Tensor:
            return x[numbers_on(x.device, places)]

        return Base(
            [some(x) for x in self.resid_pre],
            [some(x) for x in self.resid_mid],
            {name: some(x) for name, x in self.live.items()},
            {name: some(x) for name, x in self.values.items()},
        )


class _Middle(NoEdit):
    """Keeps the residual stream in the middle of a block."""

    def __init__(self) -> None:
        self.resid_mid: Tensor | None = None

    def __call__(self, name: str, activation: Tensor, first: int) -> Tensor:
        if name == "resid_mid":
            self.resid_mid = activation[0]
        return activation


def residuals(
    blocks: Blocks, n_layers: int, embedded: Float[Tensor, "pair pos d_model"]
) -> tuple[list[Tensor], list[Tensor]]:
    """The residual stream of unpatched runs: before every layer and after the last; mid-layer."""
    resid_pre, resid_mid, out = [], [], embedded
    for layer in range(n_layers):
        block, middle = blocks(layer), _Middle()
        resid_pre.append(out.to(block.device))
        nothing = block.keys_values(resid_pre[-1][:, :0])
        out = block.run(resid_pre[-1][None], nothing, middle, embedded.shape[1])[0]
        resid_mid.append(out if middle.resid_mid is None else middle.resid_mid)
    return [*resid_pre, out], resid_mid


class _Travelling:
    """A wave on its way down: the rows of its patches, those that have joined first."""

    def __init__(self, blocks: Blocks, replacement: Replacement, wave: Wave, base: Base) -> None:
        pairs, length, d_model = base.resid_pre[0].shape
        self.wave, self.base, self.replacement = wave, base, replacement
        self.rows = base.resid_pre[0].new_empty(len(wave.patches), pairs, length - wave.start, d_model)
        self.writes = Writes(replacement, _through(blocks, replacement, wave), base.values, wave.following)
        self.joined = 0
        self.fresh: list[tuple[slice, Tensor]] = []
        """Rows that stepped in behind the last layer, and where they differ from the base run."""

    @property
    def positions(self) -> int:
        """Positions of all rows that have joined."""
        return self.joined * self.rows[0].numel() // self.rows.shape[-1]

    def join(self, layer: int, block: Block) -> list[list[Patch]]:
        """Take in the patches that run through a layer; those that step in behind it are returned."""
        self.rows = self.rows.to(block.device)
        self.fresh = [(rows, moved.to(block.device)) for rows, moved in self.fresh]
        entering, stepping = _joining(self.replacement, block, self.wave, layer)
        self.rows[self.joined : self.joined + len(entering)] = self.base.resid_pre[layer][
            :, self.wave.start :
        ]
        self.joined += len(entering)
        return stepping

    def down(self, layer: int, block: Block, known: QKV, past: Past, queries: int | None) -> None:
        """Take the rows that have joined through a layer, some cells at a time."""
        positions, start = self.rows.shape[2], self.wave.start
        queries = positions if queries is None else queries
        edit = LayerWrites(self.writes, layer)
        for part, moved in self._parts(block):
            for some in _steps(part, block, self.rows):
                out = block.run(
                    self.rows[some], past.until(start), edit.of(some), queries, known.since(start), moved
                )
                self.rows[some, :, positions - queries :] = out
        self.fresh = []

    def _parts(self, block: Block) -> Iterator[tuple[slice, Tensor | None]]:
        """The rows that have joined, those apart of which only some positions differ from the base run."""
        at = 0
        for rows, moved in self.fresh if block.attention.to_qk is None else ():
            yield slice(at, rows.start), None
            yield rows, moved
            at = rows.stop
        yield slice(at, self.joined), None

    def step_in(self, layer: int, block: Block, patches: Sequence[Patch]) -> None:
        """Take in patches that move the residual stream by a known vector, behind the layer."""
        fresh = self.rows[self.joined : self.joined + len(patches)]
        fresh[:] = self.base.resid_pre[layer + 1][:, self.wave.start :]
        at = numbers_on(fresh.device, [p - self.wave.start for p in patches[0].sites[0][1]])
        fresh[:, :, at] = _step_in(self.replacement, block, layer, patches, self.base)
        if len(at) < fresh.shape[2]:
            self.fresh.append((slice(self.joined, self.joined + len(patches)), at))
        self.joined += len(patches)


def run_waves(
    blocks: Blocks, replacement: Replacement, waves: Sequence[Wave], base: Base, *, end_only: bool
) -> list[Float[Tensor, "cell pair pos d_model"]]:
    """The final residual stream of every patch of each wave, in each pair of ``base``.

    Positions are those from a wave's start on; with ``end_only`` only the last one is right.
    """
    n_layers = len(base.resid_mid)
    travelling = [_Travelling(blocks, replacement, wave, base) for wave in waves]
    for layer in range(min(wave.patches[0].layer for wave in waves), n_layers):
        block = blocks(layer)
        stepping = [wave.join(layer, block) for wave in travelling]
        if positions := sum(wave.positions for wave in travelling):
            block = block.for_many() if positions >= MANY else block
            last = end_only and layer == n_layers - 1 and not isinstance(replacement, Custom)
            known = block.qkv(base.resid_pre[layer])
            past = block.past(known)
            for wave in travelling:
                wave.down(layer, block, known, past, 1 if last else None)
        for wave, groups in zip(travelling, stepping, strict=True):
            for patches in groups:
                wave.step_in(layer, block, patches)
    return [wave.rows for wave in travelling]


def _steps(part: slice, block: Block, rows: Tensor) -> list[slice]:
    """Some rows in steps; on a CPU small enough for a step's activations to stay in its cache."""
    positions, width = rows.shape[1] * rows.shape[2], block.attention.d_head * block.attention.n_heads * 4
    if block.mlp is not None:
        width = max(width, block.mlp.W_out.shape[0])
    fitting = len(rows) if rows.is_cuda else CACHE_BYTES // (positions * width * rows.itemsize)
    starts = range(part.start, part.stop, max(1, fitting))
    return [slice(at, min(at + starts.step, part.stop)) for at in starts]


def _through(blocks: Blocks, replacement: Replacement, wave: Wave) -> list[Patch]:
    """The wave's patches, those that step in without their sites: these are written as they join."""
    layers = {layer: blocks(layer) for layer in {patch.layer for patch in wave.patches}}
    return [
        replace(patch, sites=()) if steps_in(replacement, layers[patch.layer], patch) else patch
        for patch in wave.patches
    ]


def order(replacement: Replacement, blocks: Blocks, patches: Sequence[Patch]) -> list[Patch]:
    """Patches in the order in which they join a wave."""
    known = {layer: blocks(layer) for layer in {patch.layer for patch in patches}}
    return sorted(
        patches,
        key=lambda p: (p.layer, steps_in(replacement, known[p.layer], p), _together(p)),
    )


def _joining(
    replacement: Replacement, block: Block, wave: Wave, layer: int
) -> tuple[list[Patch], list[list[Patch]]]:
    """The patches that join at a layer: those that run through it, and those that step in behind it."""
    here = [patch for patch in wave.patches if patch.layer == layer]
    entering = [patch for patch in here if not steps_in(replacement, block, patch)]
    stepping = [list(members) for _, members in groupby(here[len(entering) :], _together)]
    return entering, stepping


def steps_in(replacement: Replacement, block: Block, patch: Patch) -> bool:
    """Whether a patch moves the residual stream by a vector that takes no attention to compute."""
    if isinstance(replacement, Custom) or len(patch.sites) != 1:
        return False
    name = patch.sites[0][0].activation.name
    if name in ("z", "result"):
        return block.after_attention is None
    if name == "post":
        return block.after_mlp is None
    return name in MID + POST


def _together(patch: Patch) -> tuple:
    """What patches that step in together share: activation, positions, and which axes are narrowed."""
    site, positions = patch.sites[0]
    return site.activation.name, positions, inner(site) is None


def _step_in(
    replacement: Replacement, block: Block, layer: int, patches: Sequence[Patch], base: Base
) -> Float[Tensor, "cell pair pos d_model"]:
    """``resid_post`` at the patched positions: the base run's, moved, through the MLP where it follows."""
    sites, positions = [patch.sites[0][0] for patch in patches], patches[0].sites[0][1]
    hook_point, name = sites[0].hook_point, sites[0].activation.name
    live = gather(base.live[hook_point], sites, positions)  # [cell, pos, pair, ...]
    values = base.values.get(hook_point)
    new = None if values is None else gather(values, sites, positions)
    written = replacement.write(live, new, sites[0])
    if name == "resid_post":
        return written.transpose(1, 2)
    if name == "resid_mid":
        resid_mid = written.transpose(1, 2).contiguous()
        return block.mlp_out(resid_mid, NoEdit(), 0).add_(resid_mid)
    moved = _moved(block, name, sites, written - live).transpose(1, 2)  # [cell, pair, pos, d_model]
    if name in POST or block.parallel or block.mlp is None:
        return _at(base.resid_pre[layer + 1], positions).to(moved.device) + moved
    resid_mid = _at(base.resid_mid[layer], positions) + moved
    return block.mlp_out(resid_mid, NoEdit(), 0).add_(resid_mid)


def _at(
    resid: Float[Tensor, "pair all_pos d_model"], positions: Sequence[int]
) -> Float[Tensor, "pair pos d_model"]:
    return resid[:, numbers_on(resid.device, positions)]


def _moved(
    block: Block, name: str, sites: Sequence[Site], moved: Float[Tensor, "cell pos pair ..."]
) -> Float[Tensor, "cell pos pair d_model"]:
    """What a change of an activation adds to the residual stream."""
    whole = inner(sites[0]) is None
    which = numbers_on(moved.device, [inner(site) or 0 for site in sites])
    if name == "result":
        return moved.sum(-2) if whole else moved
    if name == "z":
        weight = block.attention.W_O  # [head, d_head, d_model]
        if whole:
            return moved.flatten(-2) @ weight.flatten(0, 1)
        return torch.bmm(moved.flatten(1, 2), weight[which]).unflatten(1, moved.shape[1:3])
    if name == "post":
        assert block.mlp is not None
        weight = block.mlp.W_out  # [neuron, d_model]
        return moved @ weight if whole else moved[..., None] * weight[which][:, None, None]
    return moved
