"""Figures: what a sweep measured, for people. The only room that imports matplotlib.

Figures are made without pyplot: nothing is registered, shown or set globally, and the caller owns
the ``Figure`` (``figure.savefig("name.png")``; a notebook shows it as the value of a cell).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patching.errors import PatchingError, unknown
from patching.results import SUMMARIES, PairInfo, Summary, SweepResult

COLOURS = "RdBu"
"""Blue moves the metric the way the patch should, red the other way; safe for colour-blind readers."""

READING_ORDER = ("layer", "activation", "head", "dest_pos", "neuron", "src_pos", "role", "pos", "site")
"""Of two axes the earlier one runs down the rows and the later one along the columns."""

POSITIONS = ("pos", "dest_pos", "src_pos")
PAGE, COLUMN = 7.0, 3.4  # inches: the widths of a page and of a column of a paper
MOST_PANELS = 48
FAINT = 0.1
SMALL, NORMAL = 7, 8  # points
LONGEST_TOKEN = 14  # characters
STEPS = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
HATCH: dict[str, Any] = dict(facecolor="0.96", edgecolor="0.75", hatch="/////", linewidth=0.0)


def heatmap(
    result: SweepResult,
    *,
    x: str | None = None,
    y: str | None = None,
    panels: str | None = None,
    at: Mapping[str, Any] | None = None,
    aggregate: Summary = "ratio_of_means",
    limit: float | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """The effects of a sweep as a heatmap; as bars where it has one axis only.

    Layers run down the rows with layer 0 on top, as TransformerLens' figures have it, positions
    along the columns with their tokens underneath. A third axis becomes panels. All panels share
    one colour scale with 0 in its middle; cells without a value are hatched.

    A position is labelled with its token where that is the same in every pair (``clean / corrupted``
    where the two differ), else with its role, else with its number; ``*`` marks labels that stand
    for differing tokens.

    Args:
        x, y, panels: Which axis goes where, if not as above.
        at: Keeps one value of an axis, e.g. ``{"layer": 2}``.
        aggregate: How pairs are joined, as in :meth:`SweepResult.effect`; ``"mean_difference"``
            shows the metric's own units, for corruptions that leave no gap.
        limit: The effect at the ends of the colour scale; by default the largest there is, and
            at least 0.1 (a tenth of the clean score for ``"mean_difference"``), so that a sweep
            that finds nothing looks like it.
        figsize: Inches; by default what the cells need, up to a page.
        title: In place of the line that says what was swept.

    Raises:
        PatchingError: for axes that the sweep does not have, or more than three of them.
    """
    if aggregate not in SUMMARIES:
        raise PatchingError(unknown("aggregate of a heatmap, which joins pairs,", aggregate, SUMMARIES))
    if limit is not None and not limit > 0:
        raise PatchingError(f"limit={limit} is the effect at the end of the colour scale: above 0.")
    drawing = _drawing(result, at or {}, aggregate, limit)
    arrangement = _arranged(drawing.axes, x, y, panels)
    figure = _Figure(figsize=figsize or _size(drawing, arrangement), layout="constrained")
    if arrangement.x is None or arrangement.y is None:
        _draw_bars(figure, drawing, arrangement)
    else:
        _draw_panels(figure, drawing, arrangement)
    figure.suptitle(_title(result, at or {}) if title is None else title, fontsize=NORMAL)
    figure.supxlabel("\n".join(_footnotes(drawing)), fontsize=SMALL)
    return figure


class _Figure(Figure):
    """A figure that notebooks can show although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        from io import BytesIO

        picture = BytesIO()
        self.savefig(picture, format="png", dpi=144)
        return picture.getvalue()


# -- what is drawn ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawing:
    """The numbers of a figure, with the axes they lie on."""

    result: SweepResult
    axes: dict[str, tuple]
    effects: np.ndarray  # [*axes]
    exists: np.ndarray  # [*axes], False where the model or the prompts have no such cell
    limit: float
    normalised: bool
    """Whether 1 is the whole gap; else effects are in units of the metric."""

    def arranged(self, *order: str | None) -> np.ndarray:
        """Effects with the named axes in this order, e.g. ``[panel, y, x]``."""
        names = list(self.axes)
        return self.effects.transpose([names.index(axis) for axis in order if axis is not None])

    def labels(self, axis: str) -> list[str]:
        return _labels(self.result, axis, self.axes[axis])

    @property
    def norm(self) -> Normalize:
        return Normalize(-self.limit, self.limit)


def _drawing(result: SweepResult, at: Mapping[str, Any], aggregate: Summary, limit: float | None) -> _Drawing:
    axes = dict(result.axes)
    index: list[Any] = [slice(None)] * len(axes)
    for axis, value in at.items():
        if axis not in axes:
            raise PatchingError(unknown("axis", axis, axes))
        if value not in axes[axis]:
            raise PatchingError(unknown(axis, value, axes[axis]))
        index[list(result.axes).index(axis)] = result.axes[axis].index(value)
    kept = {axis: values for axis, values in axes.items() if axis not in at}
    effects = result.effect(aggregate)[tuple(index)]
    exists = ~np.isnan(result.patched).all(-1)[tuple(index)]
    largest = float(np.nanmax(np.abs(effects))) if np.isfinite(effects).any() else 0.0
    normalised = aggregate != "mean_difference"
    least = FAINT if normalised else FAINT * float(np.nanmean(np.abs(result.clean)))
    return _Drawing(result, kept, effects, exists, limit or max(largest, least) or 1.0, normalised)


@dataclass(frozen=True)
class _Arrangement:
    """Which axis goes where; bars have only one of ``x`` and ``y``."""

    x: str | None
    y: str | None
    panels: str | None = None


def _arranged(axes: Mapping[str, tuple], x: str | None, y: str | None, panels: str | None) -> _Arrangement:
    """Places for all axes: the caller's, then activations or the shortest axis as panels."""
    given = [axis for axis in (x, y, panels) if axis is not None]
    for axis in given:
        if axis not in axes:
            raise PatchingError(unknown("axis", axis, axes))
    if len(set(given)) < len(given):
        raise PatchingError(f"x={x!r}, y={y!r}, panels={panels!r}: an axis has one place only.")
    if not axes:
        raise PatchingError("this is one number, not a map: read result.effect().")
    if len(axes) > 3:
        raise PatchingError(
            f"the sweep has {len(axes)} axes ({', '.join(axes)}) and a heatmap shows at most three: "
            f"keep one value of an axis with at={{{next(iter(axes))!r}: ...}}, or sweep over fewer axes."
        )
    if panels is not None and len(axes) < 3:
        raise PatchingError(f"panels={panels!r} needs three axes; the sweep has {', '.join(axes)}.")
    free = sorted((axis for axis in axes if axis not in given), key=READING_ORDER.index)
    if len(axes) == 1:
        (axis,) = axes
        sideways = y is not None or (axis == "site" and x is None)  # names of sites are long
        return _Arrangement(None, axis) if sideways else _Arrangement(axis, None)
    if len(axes) == 3 and panels is None:
        panels = "activation" if "activation" in free else min(free, key=lambda a: len(axes[a]))
        free.remove(panels)
    if panels is not None and len(axes[panels]) > MOST_PANELS:
        raise PatchingError(
            f"{len(axes[panels])} panels, one for each {panels}, are too many to read (at most "
            f"{MOST_PANELS}): make another axis the panels, or keep one value with at={{{panels!r}: ...}}."
        )
    y = y or free.pop(0)
    return _Arrangement(x or free.pop(0), y, panels)


# -- drawing ---------------------------------------------------------------------------------------


def _draw_panels(figure: Figure, drawing: _Drawing, places: _Arrangement) -> None:
    """A heatmap for each value of the panel axis, or the only one, with one colour bar."""
    assert places.x is not None
    assert places.y is not None
    values = drawing.arranged(places.panels, places.y, places.x)
    names = [""] if places.panels is None else drawing.labels(places.panels)
    size = _panel_size(drawing, places)
    grid = figure.subplots(*size.grid, squeeze=False)
    panels = values.reshape(len(names), *values.shape[-2:])
    for ax, name, panel in zip(grid.flat, names, panels, strict=False):  # the last row may be short
        _draw_cells(ax, panel, drawing)
        if size.width >= 0.28 and size.height >= 0.14:
            _print_values(ax, panel, drawing)
        _tick(ax, "x", drawing.labels(places.x), size.width)
        _tick(ax, "y", drawing.labels(places.y), size.height)
        ax.set_xlabel(places.x, fontsize=NORMAL)
        ax.set_ylabel(places.y, fontsize=NORMAL)
        if places.panels is not None:
            ax.set_title(_panel_name(places.panels, name), fontsize=NORMAL, pad=3)
    _only_outer_labels(grid, len(names))
    _colour_bar(figure, list(grid.flat), drawing)


def _draw_cells(ax: Axes, values: np.ndarray, drawing: _Drawing) -> None:
    """One panel: a cell for each value, the first row on top; hatched paper shows where none is."""
    few = values.size <= 2000  # more of them would make a slow vector file, with lines between
    ax.pcolormesh(
        np.ma.masked_invalid(values), cmap=COLOURS, norm=drawing.norm,
        edgecolors="white" if few else "none", linewidth=0.5 if few else 0.0, rasterized=not few,
    )  # fmt: skip
    ax.set_ylim(len(values), 0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if np.isnan(values).any():
        ax.patch.set(**HATCH)


def _print_values(ax: Axes, values: np.ndarray, drawing: _Drawing) -> None:
    """Each value in its cell; a plain grey 0 is exactly 0."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            pale = "0.6" if value == 0 else "black"
            ax.text(
                column + 0.5, row + 0.5, _number(value), fontsize=SMALL - 1,
                ha="center", va="center", color="white" if abs(value) > 0.6 * drawing.limit else pale,
            )  # fmt: skip


def _only_outer_labels(grid: np.ndarray, count: int) -> None:
    """Labels at the left of each row and the foot of each column; no axes beyond the last panel."""
    columns = grid.shape[1]
    for i, ax in enumerate(grid.flat):
        if i >= count:
            ax.set_axis_off()
        if i % columns:
            ax.set(ylabel="", yticklabels=[])
        if i + columns < count:
            ax.set(xlabel="", xticklabels=[])


def _draw_bars(figure: Figure, drawing: _Drawing, places: _Arrangement) -> None:
    """One axis only: a bar for each value, so that lengths can be compared."""
    ax = figure.subplots()
    (axis,) = drawing.axes
    count, upright = len(drawing.effects), places.y is None
    bar, span, line = (ax.bar, ax.axvspan, ax.axhline) if upright else (ax.barh, ax.axhspan, ax.axvline)
    missing = np.isnan(drawing.effects)
    towards = ScalarMappable(Normalize(-1, 1), COLOURS).to_rgba(np.sign(drawing.effects) * 0.75)
    bar(np.arange(count) + 0.5, np.where(missing, 0.0, drawing.effects), 0.8, color=towards)
    for i in np.flatnonzero(missing).tolist():
        span(i, i + 1, **HATCH)
    line(0, color="black", linewidth=0.6)
    inches = (PAGE / 2 if upright else figure.get_figheight()) / count
    _tick(ax, "x" if upright else "y", drawing.labels(axis), inches)
    name = "effect" if drawing.normalised else "change"
    if upright:
        ax.set(xlim=(0, count), xlabel=axis, ylabel=name)
    else:
        ax.set(ylim=(count, 0), xlabel=name, ylabel=axis)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(NORMAL)
    ax.tick_params(labelsize=SMALL, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def _tick(ax: Axes, side: str, labels: Sequence[str], inches: float) -> None:
    """Labels in the middle of the cells: every one where it fits, else every n-th."""
    every = next(n for n in STEPS if n * inches >= 0.11)
    centres = np.arange(len(labels))[::every] + 0.5
    put = ax.set_xticks if side == "x" else ax.set_yticks
    put(centres, labels[::every], fontsize=SMALL, parse_math=False)  # a token may hold a $
    if side == "x" and max(map(len, labels)) * 0.06 > inches * every:
        steep = inches * every < 0.2
        for label in ax.get_xticklabels():
            label.set(rotation=90 if steep else 45, ha="right", rotation_mode="anchor")
            label.set_verticalalignment("center" if steep else "top")


def _colour_bar(figure: Figure, axes: Sequence[Axes], drawing: _Drawing) -> None:
    beyond = np.nan_to_num(np.abs(drawing.effects)) > drawing.limit
    bar = figure.colorbar(
        ScalarMappable(drawing.norm, COLOURS), ax=axes, location="bottom", aspect=40, pad=0.02,
        extend="both" if beyond.any() else "neither", ticks=MaxNLocator(5),
    )  # fmt: skip
    bar.ax.tick_params(labelsize=SMALL, length=2)
    bar.outline.set_visible(False)


# -- sizes, in inches ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PanelSize:
    """How panels are laid out, and the size of a cell in them."""

    grid: tuple[int, int]
    """Rows and columns of panels."""
    width: float
    height: float


def _panel_size(drawing: _Drawing, places: _Arrangement) -> _PanelSize:
    """The layout on a page with the largest cells and few empty places."""
    rows, columns = (len(drawing.axes[axis or ""]) for axis in (places.y, places.x))
    if places.panels is None:
        return _PanelSize((1, 1), min(max(0.38, 2.6 / columns), 6 / columns), min(0.24, 4.5 / rows))
    count = len(drawing.axes[places.panels])
    best, most = None, 0.0
    for across in range(1, count + 1):
        down = -(-count // across)
        width = min(0.3, ((PAGE - 0.6) / across - 0.2) / columns)
        height = min(0.2, (7.0 / down - 0.3) / rows)
        if (worth := min(width, 1.5 * height) * count / (down * across)) > most:
            best, most = _PanelSize((down, across), width, height), worth
    assert best is not None
    return best


def _size(drawing: _Drawing, places: _Arrangement) -> tuple[float, float]:
    """What the cells need with their labels, the title, the colour bar and the footnotes."""
    labels = {axis: 0.055 * max(map(len, drawing.labels(axis))) for axis in drawing.axes}
    if places.x is None:
        return PAGE - 1.5, min(9.0, 1.4 + 0.2 * len(drawing.effects))
    if places.y is None:
        return min(PAGE, max(COLUMN, 1 + 0.3 * len(drawing.effects))), 2.2 + labels[places.x]
    size = _panel_size(drawing, places)
    (down, across), columns, rows = size.grid, len(drawing.axes[places.x]), len(drawing.axes[places.y])
    wide = across * (size.width * columns + 0.2) + labels[places.y] + 0.3
    high = down * (size.height * rows + (0.3 if places.panels else 0.0)) + labels[places.x]
    return min(PAGE, max(COLUMN, wide)), high + 1.2 + 0.1 * len(_footnotes(drawing))


# -- words -----------------------------------------------------------------------------------------


def _title(result: SweepResult, at: Mapping[str, Any]) -> str:
    """Two lines: what was swept, and on what."""
    swept = result.activation if isinstance(result.activation, str) else ", ".join(result.activation)
    into = "corrupted run, clean values" if result.direction == "denoising" else "clean run, corrupted values"
    kept = "".join(f", {axis} {value}" for axis, value in at.items())
    known = [result.provenance[key] for key in ("model", "dataset") if key in result.provenance]
    pairs = "1 pair" if len(result.pairs) == 1 else f"{len(result.pairs)} pairs"
    return f"{swept}{kept}: {result.direction} ({into})\n{', '.join([*known, pairs, result.metric])}"


def _footnotes(drawing: _Drawing) -> list[str]:
    """What 0 and 1 mean, and the marks and hatching that the figure uses."""
    result, missing = drawing.result, np.isnan(drawing.effects)
    labels = [label for axis in drawing.axes for label in drawing.labels(axis)]
    there = "clean" if result.direction == "denoising" else "corrupted"
    notes = {
        f"effect: 0 = none, 1 = {result.metric} as in the {there} run": drawing.normalised,
        f"change of {result.metric} towards the {there} run": not drawing.normalised,
        "token / token: clean / corrupted": any(" / " in label for label in labels),
        "*: clean and corrupted tokens differ": any(label.endswith("*") for label in labels),
        "hatched: no such cell": (missing & ~drawing.exists).any(),
        "hatched: no gap between clean and corrupted": (missing & drawing.exists).any(),
    }
    return [note for note, needed in notes.items() if needed]


def _panel_name(axis: str, label: str) -> str:
    return label if axis in ("activation", "role") else f"{axis} {label}"


def _labels(result: SweepResult, axis: str, values: Sequence[Any]) -> list[str]:
    if axis not in POSITIONS and axis != "role":
        return [str(value) for value in values]
    labels = [_position_label(result, value) for value in values]
    bare = all(label.startswith("pos ") for label in labels)  # no token among them to tell them from
    return [label.removeprefix("pos ") for label in labels] if bare else labels


def _position_label(result: SweepResult, pos: int | str) -> str:
    """The token where all pairs have the same one, else the role, else the number."""
    there = [(pair, at) for pair in result.pairs for at in _places(pair, pos)]
    tokens = {(pair.clean_tokens[at], pair.corrupted_tokens[at]) for pair, at in there}
    differ = any(clean != corrupted for clean, corrupted in tokens)
    if len(tokens) == 1 and not isinstance(pos, str):
        clean, corrupted = map(_token, tokens.pop())
        return f"{clean} / {corrupted}" if differ else clean
    name = pos if isinstance(pos, str) else result.role(pos) or f"pos {pos}"
    return name + ("*" if differ else "")


def _places(pair: PairInfo, pos: int | str) -> tuple[int, ...]:
    """Where a position or role is in a pair, counted from the start."""
    length = len(pair.clean_tokens)
    if isinstance(pos, str):
        return tuple(pair.roles.get(pos, ()))
    return (pos % length,) if -length <= pos < length else ()


def _token(token: str) -> str:
    """A token as a label: without the space in front, but never empty."""
    visible = token.strip(" ").replace("\n", "\\n").replace("\t", "\\t") or "␣" * len(token) or "''"
    return visible if len(visible) <= LONGEST_TOKEN else visible[: LONGEST_TOKEN - 1] + "…"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}".replace("-0.00", "0.00")
