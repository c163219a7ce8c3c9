"""Which cells a sweep has: the grid that is asked for, over axes that exist; all problems at once."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from patching.errors import SiteError, unknown
from patching.sites import (
    ACTIVATIONS,
    AXES,
    Activation,
    Cell,
    Grid,
    ModelShape,
    Site,
    Sites,
    activation_of,
    as_cell,
    split_layer,
)

Asked = str | Site | Sequence[str] | Sequence[Sites]
"""What a sweep is asked to patch: names of activations, sites, or sets of sites."""


@dataclass(frozen=True)
class Choice:
    """The user's narrowing of the axes; ``None`` leaves an axis whole."""

    layers: Sequence[int] | None = None
    positions: Sequence[int | str] | None = None
    heads: Sequence[int] | None = None
    window: int = 1

    def as_tuples(self) -> "Choice":
        """The same choice, with plain numbers whatever was given: a range, an array, a tensor."""

        def plain(values: Sequence[int | str] | None) -> tuple | None:
            if values is None:
                return None
            return tuple(value if isinstance(value, str) else int(value) for value in values)

        return Choice(plain(self.layers), plain(self.positions), plain(self.heads), self.window)


def grid(
    activation: Asked,
    over: Sequence[str],
    shape: ModelShape,
    *,
    n_pos: int,
    roles: Sequence[str] = (),
    choice: Choice = Choice(),
) -> Grid:
    """All cells of a sweep of ``activation`` over the axes ``over``.

    ``n_pos`` is the longest prompt's length and ``roles`` the role names the dataset knows.
    A list of activations adds a leading ``activation`` axis; a list of sites, or of tuples of sites
    that are patched together, is one axis ``site``.
    Raises :class:`SiteError` for anything that does not exist, naming what does.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    choice = choice.as_tuples()
    items: list = [activation] if isinstance(activation, str | Site) else list(activation)
    if not items:
        raise SiteError("no activation to sweep: give a name, a list of names or a list of sites.")
    if all(isinstance(item, Site | tuple) for item in items):
        _check_not_narrowed(choice)
        return _site_grid(items, shape, n_pos, roles)
    kinds = [_kind(item, shape) for item in items if isinstance(item, str)]
    if len(kinds) != len(items):
        raise SiteError(
            "a sweep takes names of activations, or sites and tuples of sites, not both in one list."
        )
    _check_request(kinds, over, shape, n_pos, roles, choice)
    values = {axis: _axis_values(axis, kinds, shape, n_pos, roles, choice) for axis in over}
    points = list(itertools.product(*values.values()))
    cells = tuple(
        _cell(kind, dict(zip(over, point, strict=True)), shape, choice) for kind in kinds for point in points
    )
    if isinstance(activation, str):
        return Grid(values, cells)
    names = tuple(item for item in items if isinstance(item, str))
    return Grid({"activation": names, **values}, cells)


@dataclass(frozen=True)
class _Kind:
    """A requested activation: all layers of it, or one where a full hook name was given."""

    activation: Activation
    layers: tuple[int, ...] | None
    """``None`` for a hook point outside the blocks."""

    def heads(self, shape: ModelShape) -> int:
        grouped = "kv_head" in self.activation.axes
        return shape.n_key_value_heads if grouped else shape.n_heads

    @cached_property
    def axes(self) -> tuple[str, ...]:
        layer = () if self.layers is None else ("layer",)
        own = tuple("head" if a == "kv_head" else a for a in self.activation.axes)
        return layer + own + (("role",) if "pos" in own else ())


def _kind(name: str, shape: ModelShape) -> _Kind:
    if name in ACTIVATIONS:
        found = ACTIVATIONS[name]
        layers = tuple(l for l in range(shape.n_layers) if found.hook_point(l) in shape.hook_points)
        if not layers:
            raise SiteError(
                f"this model has no {name!r}: no hook point {found.hook!r} in any of its "
                f"{shape.n_layers} layers. Available: {', '.join(_available(shape))}."
            )
        return _Kind(found, layers)
    if name not in shape.hook_points:
        raise SiteError(
            unknown("activation or hook point", name, _available(shape))
            + f" Full hook names work too, e.g. 'blocks.0.hook_resid_pre'{_nearest(name, shape)}."
        )
    layer, _ = split_layer(name)
    return _Kind(activation_of(name), None if layer is None else (layer,))


def _available(shape: ModelShape) -> list[str]:
    return [n for n, a in ACTIVATIONS.items() if a.hook_point(0) in shape.hook_points]


def _nearest(name: str, shape: ModelShape) -> str:
    import difflib

    close = difflib.get_close_matches(name, shape.hook_points, n=3)
    return f"; nearest: {', '.join(close)}" if close else ""


def _check_request(
    kinds: Sequence[_Kind],
    over: Sequence[str],
    shape: ModelShape,
    n_pos: int,
    roles: Sequence[str],
    choice: Choice,
) -> None:
    layers = {layer for kind in kinds for layer in kind.layers or ()}
    heads = set(range(max(kind.heads(shape) for kind in kinds)))
    bad = [*_axis_problems(kinds, over, roles)]
    bad += [
        f"{name} is empty: leave it out to keep them all."
        for name in ("layers", "positions", "heads")
        if getattr(choice, name) == ()
    ]
    bad += _outside("layer", choice.layers, layers)
    bad += _outside("head", choice.heads, heads if any("head" in k.axes for k in kinds) else set())
    bad += _position_problems(choice.positions or (), over, n_pos, roles)
    bad += _window_problems(choice, over, layers)
    if bad:
        raise SiteError("\n".join(dict.fromkeys(bad)))


def _axis_problems(kinds: Sequence[_Kind], over: Sequence[str], roles: Sequence[str]) -> Iterable[str]:
    for axis in over:
        if axis not in AXES:
            yield unknown("axis", axis, AXES)
        for kind in kinds:
            if axis in AXES and axis not in kind.axes:
                yield f"{kind.activation.name!r} has no axis {axis!r}; its axes: {', '.join(kind.axes)}."
    if len(set(over)) != len(over):
        yield f"an axis is named twice in over={tuple(over)}."
    if {"pos", "role"} <= set(over):
        yield "'pos' and 'role' both name token positions: sweep over one of them."
    if "role" in over and not roles:
        yield "this dataset names no roles; sweep over 'pos', or override its roles()."


def _position_problems(
    positions: Sequence[int | str], over: Sequence[str], n_pos: int, roles: Sequence[str]
) -> Iterable[str]:
    for pos in positions:
        if isinstance(pos, str):
            if pos not in roles:
                yield unknown("role", pos, roles or ["none in this dataset"])
        elif "role" in over:
            yield f"position {pos} is no role: over='role' goes by name; sweep over 'pos' for numbers."
        elif not -n_pos <= pos < n_pos:
            yield f"position {pos} is outside the prompts: the longest has {n_pos} tokens."


def _window_problems(choice: Choice, over: Sequence[str], layers: set[int]) -> Iterable[str]:
    if choice.window < 1 or (choice.window > 1 and "layer" not in over):
        yield (
            f"window={choice.window}: a window joins consecutive layers, so it is at least 1 and "
            "needs 'layer' among the axes of over."
        )
    elif choice.window > max(1, len(layers)):
        yield f"window={choice.window} is larger than the {len(layers)} layers there are."
    else:
        short = [l for l in choice.layers or () if l in layers and l + choice.window - 1 > max(layers)]
        if short:
            yield (
                f"window={choice.window} does not fit at layer {', '.join(map(str, short))}: "
                f"the last layer is {max(layers)}."
            )


def _outside(axis: str, wanted: Sequence[int] | None, there: set[int]) -> list[str]:
    missing = [value for value in wanted or () if value not in there]
    if not missing:
        return []
    have = f"{min(there)}..{max(there)}" if there else f"no axis {axis!r} for this activation"
    return [f"{axis} {', '.join(map(str, missing))} does not exist; this model has {have}."]


def _axis_values(
    axis: str,
    kinds: Sequence[_Kind],
    shape: ModelShape,
    n_pos: int,
    roles: Sequence[str],
    choice: Choice,
) -> tuple:
    if axis == "layer":
        every = sorted({layer for kind in kinds for layer in kind.layers or ()})
        chosen = [l for l in every if choice.layers is None or l in choice.layers]
        return tuple(l for l in chosen if all(l + i in every for i in range(choice.window)))
    if axis == "head":
        n_heads = max(kind.heads(shape) for kind in kinds)
        return tuple(range(n_heads)) if choice.heads is None else tuple(choice.heads)
    if axis == "neuron":
        return tuple(range(shape.d_mlp or 0))
    if axis == "role":
        return tuple(choice.positions or roles)
    if axis in ("pos", "dest_pos") and choice.positions is not None:
        return tuple(choice.positions)
    return tuple(range(n_pos))


def _cell(kind: _Kind, point: Mapping[str, object], shape: ModelShape, choice: Choice) -> Cell:
    """The sites at one point of the grid: the product over axes that are patched jointly."""
    layers: Iterable[int | None]
    if kind.layers is None:
        layers = (None,)
    elif "layer" in point:
        start = point["layer"]
        assert isinstance(start, int)
        layers = range(start, start + choice.window)
    else:
        layers = kind.layers if choice.layers is None else choice.layers
    if kind.layers is not None and not set(layers) <= set(kind.layers):
        return ()
    has_head = "head" in kind.axes
    heads = (point["head"],) if "head" in point else (choice.heads or (None,)) if has_head else (None,)
    if has_head and any(isinstance(h, int) and h >= kind.heads(shape) for h in heads):
        return ()
    place = point.get("pos", point.get("role", point.get("dest_pos")))
    places = (place,) if place is not None else choice.positions or (None,)
    pos_axis = "dest_pos" if "dest_pos" in kind.axes else "pos"
    rest = {axis: point[axis] for axis in ("neuron", "src_pos") if axis in point}
    return tuple(
        Site(
            kind.activation.hook if layer is None else kind.activation.hook_point(layer),
            **{pos_axis: pos, "head": head, **rest},  # type: ignore[arg-type]
        )
        for layer, head, pos in itertools.product(layers, heads, places)
    )


def _check_not_narrowed(choice: Choice) -> None:
    given = [name for name in ("layers", "positions", "heads") if getattr(choice, name) is not None]
    given += [f"window={choice.window}"] if choice.window != 1 else []
    if given:
        raise SiteError(
            f"sites say which layers, positions and heads are patched: leave out {', '.join(given)}."
        )


def _site_grid(items: Sequence[Sites], shape: ModelShape, n_pos: int, roles: Sequence[str]) -> Grid:
    cells = tuple(as_cell(item) for item in items)
    bad = [problem for cell in cells for problem in _cell_problems(cell, shape, n_pos, roles)]
    if bad:
        raise SiteError("\n".join(dict.fromkeys(bad)))
    return Grid({"site": tuple(items)}, cells)


def _cell_problems(cell: Cell, shape: ModelShape, n_pos: int, roles: Sequence[str]) -> Iterable[str]:
    if not cell:
        yield "a set of no sites patches nothing: give it one site at least."
    for site in cell:
        if not isinstance(site, Site):
            yield f"a set of sites holds {site!r}, which is no Site."
        elif cell.count(site) > 1:
            yield f"{site} stands {cell.count(site)} times in one set: name it once."
        else:
            yield from _site_problems(site, shape, n_pos, roles)


def _site_problems(site: Site, shape: ModelShape, n_pos: int, roles: Sequence[str]) -> Iterable[str]:
    if site.hook_point not in shape.hook_points:
        yield f"{site}: no such hook point{_nearest(site.hook_point, shape)}."
        return
    own = site.activation.axes
    heads = shape.n_key_value_heads if "kv_head" in own else shape.n_heads
    sizes = {"pos": n_pos, "dest_pos": n_pos, "src_pos": n_pos, "neuron": shape.d_mlp or 0}
    for axis in ("pos", "head", "neuron", "dest_pos", "src_pos"):
        value = getattr(site, axis)
        if value is None:
            continue
        if axis not in own and not (axis == "head" and "kv_head" in own):
            yield f"{site}: {site.activation.name!r} has no axis {axis!r}; its axes: {', '.join(own)}."
        elif isinstance(value, str):
            if value not in roles:
                yield f"{site}: " + unknown("role", value, roles or ["none in this dataset"])
        else:
            size = heads if axis == "head" else sizes[axis]
            low = -size if "pos" in axis else 0
            if not low <= value < size:
                yield f"{site}: {axis} {value} is outside {low}..{size - 1}."
