"""Results: values with axes. What a sweep measured, as numbers, tables and records.

An effect is 0 where patching did nothing and 1 where it moved the metric all the way from the base
run to the other one. It is not bounded: components that overshoot lie above 1, components that work
against the answer below 0. Denoising effects show sufficiency, noising effects necessity
(Heimersheim & Nanda 2024).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from patching import statistics
from patching.errors import PatchingError, PatchingWarning, unknown
from patching.sites import Cell, as_cell
from patching.statistics import Correction

Direction = Literal["denoising", "noising"]
Aggregate = Literal["ratio_of_means", "mean_of_ratios", "mean_difference", "none"]
Summary = Literal["ratio_of_means", "mean_of_ratios", "mean_difference"]

VANISHING = 1e-5
"""A gap between clean and corrupted smaller than this share of the values themselves is no gap."""
FEW_PAIRS = 5
"""With fewer pairs than this, an interval of the mean gap says nothing, and none is asked for."""
SMALL_GAP = 0.1
"""A mean gap below this share of the mean absolute clean score is too small to be a denominator."""
ZERO_IS_NOTHING = ("logit_diff", "prob_diff", "prob", "accuracy")
"""Metrics whose 0 means that there is nothing to explain, so that a gap can be small beside a score."""


@dataclass(frozen=True)
class PatchingResult:
    """One patched run of one pair at one hook point. An effect without a denominator is NaN.

    The three scores are those of the dataset's metric, whether it is a logit difference or not.
    """

    hook_point: str
    clean_logit_diff: float
    corrupted_logit_diff: float
    patched_logit_diff: float
    patching_effect: float


def effect_of(
    clean: np.ndarray, corrupted: np.ndarray, patched: np.ndarray, direction: Direction
) -> np.ndarray:
    """Normalised effect, elementwise; NaN where clean and corrupted do not differ.

    Denoising: ``(patched - corrupted) / (clean - corrupted)``; noising:
    ``(clean - patched) / (clean - corrupted)``.
    """
    gap = np.asarray(clean - corrupted, dtype=float)
    size = (np.abs(clean) + np.abs(corrupted)) / 2
    gap = np.where(np.abs(gap) <= VANISHING * size, np.nan, gap)
    moved = patched - corrupted if direction == "denoising" else clean - patched
    return moved / gap + 0.0  # no negative zeros


def warn_of_no_gap(reason: str, what: str = "sweep") -> None:
    """One warning where effects are not normalised."""
    warnings.warn(
        f"{what}: {reason}, so its effect is NaN. Does the corruption change the answer? The raw values "
        "are kept; effect('mean_difference') needs no gap.",
        PatchingWarning,
        stacklevel=3,
    )


def warn_of_vanishing(effects: np.ndarray, what: str) -> None:
    """One warning where effects are NaN for want of a denominator."""
    missing = int(np.isnan(effects).sum())
    if missing:
        warnings.warn(
            f"{what}: clean and corrupted score the same for {missing} of {effects.size}, so their "
            "effect is NaN. Does the corruption change the answer? The raw values are kept.",
            PatchingWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class PairInfo:
    """What a reader of the results sees of one pair."""

    index: int
    clean_tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    roles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    template: str = ""

    def role_at(self, pos: int) -> str | None:
        """The first role that a position has, if any; negative positions count from the end."""
        at = pos % len(self.clean_tokens)
        return next((role for role, places in self.roles.items() if at in places), None)


@dataclass(frozen=True)
class SweepResult:
    """Clean, corrupted and patched metric values of a sweep, with the axes they lie on.

    ``axes`` maps each axis to its values in order; ``patched`` has one axis for each and the pair
    axis last. Values of cells that do not exist are NaN.
    """

    axes: dict[str, tuple]
    clean: np.ndarray  # [pair]
    corrupted: np.ndarray  # [pair]
    patched: np.ndarray  # [*axes, pair]
    cells: tuple[Cell, ...]
    pairs: tuple[PairInfo, ...]
    activation: str | tuple[str, ...]
    direction: Direction
    metric: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def effect(self, aggregate: Aggregate = "ratio_of_means") -> np.ndarray:
        """Normalised effects over the axes; ``"none"`` keeps the pair axis.

        ``"ratio_of_means"`` (the headline): mean movement over mean gap, over the pairs in which
        the cell exists. ``"mean_of_ratios"``: mean of the per-pair effects, which pairs with a
        small gap can dominate. Both are NaN where :attr:`no_gap` says why. ``"mean_difference"``:
        mean movement towards the other run in units of the metric, which needs no gap.
        """
        if aggregate not in AGGREGATES:
            raise PatchingError(unknown("aggregate", aggregate, AGGREGATES))
        if aggregate == "mean_difference":
            return _mean_over_pairs(self._moved())
        if aggregate == "none":
            return effect_of(self.clean, self.corrupted, self.patched, self.direction)
        if self.no_gap:
            return np.full(self.patched.shape[:-1], np.nan)
        if aggregate == "mean_of_ratios":
            return _mean_over_pairs(self.effect("none"))
        return self._ratio_of_means()

    def _ratio_of_means(self) -> np.ndarray:
        there = ~np.isnan(self.patched)
        clean = _mean_over_pairs(np.where(there, self.clean, np.nan))
        corrupted = _mean_over_pairs(np.where(there, self.corrupted, np.nan))
        return effect_of(clean, corrupted, _mean_over_pairs(self.patched), self.direction)

    def _moved(self) -> np.ndarray:
        """How far each pair moved towards the other run, ``[*axes, pair]``."""
        toward = self.patched - self.corrupted if self.direction == "denoising" else self.clean - self.patched
        return toward + 0.0  # no negative zeros

    @property
    def measured(self) -> bool:
        """Whether every value comes from a patched run; not so for gradient methods, which estimate."""
        return "estimate" not in self.provenance

    def asked(self, swept: str) -> str:
        """What was done to the activations ``swept``, in words: measured, or how it was estimated."""
        if self.measured:
            return f"{self.direction} of {swept}"
        by, kind = self.provenance["estimated_by"], self.provenance["estimate"]
        return f"{by} of {swept}, {kind} estimate of {self.direction}"

    # -- statistics ---------------------------------------------------------------------------

    @cached_property
    def no_gap(self) -> str:
        """Why effects are not normalised; empty where they are.

        From five pairs on, the mean of ``clean - corrupted`` must have a 95 % bootstrap interval
        without 0 in it, and for metrics on which 0 is nothing (``logit_diff``, ``prob_diff``,
        ``prob``, ``accuracy``) be at least a tenth of the mean absolute clean score.
        """
        gap = self.clean - self.corrupted
        known = np.flatnonzero(~np.isnan(gap))
        gap, clean = gap[known], self.clean[known]
        if len(gap) < FEW_PAIRS:
            return ""
        mean = float(gap.mean())
        units = statistics.units_of([self.pairs[p].template for p in known])
        if units.max() + 1 < FEW_PAIRS:
            units = np.arange(len(gap))
        low, high = statistics.mean_interval(gap, units)
        if low <= 0 <= high:
            return (
                f"the mean gap between clean and corrupted is {mean:+.3g}, 95 % interval {low:+.3g} to "
                f"{high:+.3g} over {len(gap)} pairs, and cannot be told from 0"
            )
        size = float(np.abs(clean).mean())
        if self.metric in ZERO_IS_NOTHING and abs(mean) < SMALL_GAP * size:
            return (
                f"the mean gap between clean and corrupted is {mean:+.3g}, less than a tenth of the "
                f"clean score, {size:.3g} on average"
            )
        return ""

    def interval(
        self, level: float = 0.95, aggregate: Summary = "ratio_of_means", resamples: int = 2000, seed: int = 0
    ) -> np.ndarray:
        """Bootstrap interval of :meth:`effect`, ``[*axes, 2]``: from, to.

        Percentiles over resamples of the templates, whole; of the pairs where fewer than two
        templates are named. All cells see the same resamples. The interval is of each cell by
        itself: over many cells some will miss. NaN where the effect is.
        """
        _check_range("level", level, 0 < level < 1, "between 0 and 1")
        _check_range("resamples", resamples, resamples >= 1, "at least 1")
        units, few = self._units()
        if units.max() + 1 < FEW_PAIRS:
            _warn_user(f"an interval from {few} is too narrow to be relied on.")
        values, scale = self.summands(aggregate)
        interval = statistics.bootstrap_interval(
            values, scale, units, level=level, resamples=resamples, seed=seed
        ).reshape(*self.patched.shape[:-1], 2)
        return np.where(np.isnan(self.effect(aggregate))[..., None], np.nan, interval)

    def p_values(
        self, correction: Correction = "max_t", permutations: int = 10_000, seed: int = 0
    ) -> np.ndarray:
        """Two-sided p-values over the axes: does patching the cell move the metric up as often as down?

        Signs of the movements ``patched - base`` are flipped, those of a template together. All
        flips where that many are allowed, ``permutations`` random ones otherwise. ``"max_t"`` (for
        claims) corrects for having looked at all cells, ``"bh"`` (for exploration) bounds the share
        of false findings, ``"none"`` does neither. A p-value says nothing of size: compare effects
        with ``patcher.null_floor``. Cells that never move have p = 1.
        """
        if correction not in CORRECTIONS:
            raise PatchingError(unknown("correction", correction, CORRECTIONS))
        _check_range("permutations", permutations, permutations >= 1, "at least 1")
        if self.provenance.get("magnitudes"):
            raise PatchingError(
                f"the estimates of method={self.provenance['method']!r} are magnitudes, all on one side of "
                "0: flipping their signs tests nothing. Use p_values of an exact sweep or of 'attribution'."
            )
        units, few = self._units()
        smallest = 0.5 ** float(units.max())
        if smallest > 0.05:
            _warn_user(f"with {few} no p-value can be smaller than {smallest:.3g}.")
        p = statistics.sign_flip_p(
            self._moved().reshape(-1, len(self.pairs)), units,
            correction=correction, permutations=permutations, seed=seed,
        )  # fmt: skip
        return p.reshape(self.patched.shape[:-1])

    def stability(self, k: int = 10, resamples: int = 200, seed: int = 0) -> "Stability":
        """How much of the ``k`` strongest cells stays the same when the pairs change.

        Pairs are resampled as in :meth:`interval`. NaN where no cell has an effect.
        """
        _check_range("k", k, k >= 1, "at least 1")
        _check_range("resamples", resamples, resamples >= 1, "at least 1")
        values, scale = self.summands("ratio_of_means")
        values = np.where(np.isnan(self.effect().ravel())[:, None], np.nan, values)
        units, _ = self._units()
        jaccard, inclusion = statistics.inclusion(values, scale, units, k=k, resamples=resamples, seed=seed)
        return Stability(k, jaccard, inclusion.reshape(self.patched.shape[:-1]))

    def _units(self) -> tuple[np.ndarray, str]:
        """What is resampled, a number for each pair, and how many of it there are, in words."""
        units = statistics.units_of([pair.template for pair in self.pairs])
        count = int(units.max()) + 1
        kind = "pair" if count == len(self.pairs) else "template"
        return units, f"{count} {kind}{'s' * (count != 1)}"

    def summands(self, aggregate: Summary) -> tuple[np.ndarray, np.ndarray]:
        """Values ``[cell, pair]`` and scale ``[pair]`` whose sums have the aggregate as their ratio."""
        if aggregate not in SUMMARIES:
            raise PatchingError(unknown("aggregate", aggregate, SUMMARIES))
        values = self.effect("none") if aggregate == "mean_of_ratios" else self._moved()
        ones = np.ones(len(self.pairs))
        scale = self.clean - self.corrupted if aggregate == "ratio_of_means" else ones
        return values.reshape(-1, len(self.pairs)), scale

    # -- tables -------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One tidy row for each cell and pair, with raw values and effect.

        Columns ``pos``, ``head``, ``neuron`` and so on are empty where the cell patches the whole
        axis; a cell that joins several sites lists their hook points, separated by ``+``.
        """
        effects = self.effect("none").reshape(len(self.cells), -1)
        patched = self.patched.reshape(len(self.cells), -1)
        labels = self._labels()
        rows = [
            {
                **labels[c],
                **self._place(cell, pair),
                "pair": pair.index,
                "metric": self.metric,
                "clean": self.clean[p],
                "corrupted": self.corrupted[p],
                "patched": patched[c, p],
                "effect": effects[c, p],
            }
            for c, cell in enumerate(self.cells)
            for p, pair in enumerate(self.pairs)
        ]
        whole = dict.fromkeys(("layer", "pos", "head", "neuron", "src_pos"), "Int64")
        return pd.DataFrame(rows, columns=[*FRAME_COLUMNS]).astype(whole)

    def _labels(self) -> list[dict[str, Any]]:
        """What the rows of a cell share, whatever the pair."""
        return [
            {
                "direction": self.direction,
                "activation": _joined(site.activation.name for site in cell) or None,
                "hook_point": _joined(site.hook_point for site in cell) or None,
                "layer": self._layer(cell),
                **{a: _only(getattr(site, a) for site in cell) for a in ("head", "neuron", "src_pos")},
            }
            for cell in self.cells
        ]

    def _layer(self, cell: Cell) -> int | None:
        """The layer of a cell, the first one of a window; None where all layers are patched."""
        layers = {site.layer for site in cell if site.layer is not None}
        return min(layers) if len(layers) == 1 or (layers and "layer" in self.axes) else None

    def _place(self, cell: Cell, pair: PairInfo) -> dict[str, Any]:
        """Role, position and token of a cell in one pair."""
        pos = _only(site.dest_pos if site.pos is None else site.pos for site in cell)
        if pos is None:
            return {"pos": None, "role": None, "token": None}
        role = pos if isinstance(pos, str) else None
        length = len(pair.clean_tokens)
        there = cell[0].positions(length, pair.roles)
        if there is None:
            return {"pos": None, "role": role, "token": None}
        return {
            "pos": there[0] if len(there) == 1 else None,
            "role": role,
            "token": "".join(pair.clean_tokens[t] for t in there),
        }

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` cells with the largest absolute effect: a column for each axis, then the effect."""
        effects = self.effect().ravel()
        order = np.argsort(-np.abs(np.where(np.isnan(effects), 0.0, effects)), kind="stable")
        order = order[~np.isnan(effects[order])][:k]
        places = np.unravel_index(order, self.patched.shape[:-1]) if self.axes else ()
        columns = {
            axis: [values[i] for i in where]
            for (axis, values), where in zip(self.axes.items(), places, strict=True)
        }
        return pd.DataFrame({**columns, "effect": effects[order]})

    def summary(self, k: int = 10) -> str:
        """What was asked, the gap, and the ``k`` strongest cells, as text; prints well."""
        gap = float(np.mean(self.clean - self.corrupted))
        swept = self.activation if isinstance(self.activation, str) else ", ".join(self.activation)
        meaning = "sufficient" if self.direction == "denoising" else "necessary"
        scale = f"1 = {meaning} for the whole gap" if self.measured else "estimates: 1 = the whole gap"
        shape = " × ".join(f"{len(values)} {axis}" for axis, values in self.axes.items())
        pairs = "1 pair" if len(self.pairs) == 1 else f"{len(self.pairs)} pairs"
        lines = [
            f"{self.asked(swept)}: {shape}, {pairs}",
            f"{self.metric}: clean {self.clean.mean():+.3f}, corrupted {self.corrupted.mean():+.3f}, "
            f"gap {gap:+.3f}",
            f"strongest {min(k, self.effect().size)} ({scale}, 0 = no effect):",
        ]
        top = self.top(k)
        names = [self.name_of(row) for row in top.to_dict("records")]
        width = max(map(len, names), default=0)
        bars = [f"{'█' * round(20 * min(abs(e), 1.5))}" for e in top["effect"]]
        shown = zip(names, top["effect"], bars, strict=True)
        lines += [f"  effects are NaN: {self.no_gap}."] if self.no_gap else []
        return "\n".join(lines + [f"  {name:<{width}}  {effect:+.3f}  {bar}" for name, effect, bar in shown])

    def name_of(self, point: Mapping[Any, Any]) -> str:
        """A short name of the cell at a point on the axes: ``L9H6``, ``L5 pos 10 ' John'``, ``L7 S2``."""
        layer, head = point.get("layer"), point.get("head")
        parts = [str(point[a]) for a in ("activation", "circuit", "edge") if a in point]
        parts += [" + ".join(map(str, as_cell(point["site"])))] if "site" in point else []
        parts.append((f"L{layer}" if layer is not None else "") + (f"H{head}" if head is not None else ""))
        parts += [str(point["role"])] if "role" in point else []
        parts += [f"{a} {point[a]}" for a in ("pos", "neuron", "dest_pos", "src_pos") if a in point]
        pos = point.get("pos")
        if isinstance(pos, int | np.integer):
            token = self.token(int(pos))
            parts.append(repr(token) if token is not None else self.role(int(pos)) or "")
        return " ".join(part for part in parts if part) or "everything"

    def token(self, pos: int) -> str | None:
        """The clean token at a position, where it is the same in every pair."""
        sides = [pair.clean_tokens for pair in self.pairs]
        tokens = {side[pos] for side in sides if -len(side) <= pos < len(side)}
        return tokens.pop() if len(tokens) == 1 else None

    def role(self, pos: int) -> str | None:
        """The role at a position, where it is the same in every pair."""
        roles = {p.role_at(pos) for p in self.pairs if -len(p.clean_tokens) <= pos < len(p.clean_tokens)}
        return roles.pop() if len(roles) == 1 else None

    def records(self) -> list[PatchingResult]:
        """One :class:`PatchingResult` for each cell and pair in which the cell exists."""
        frame = self.to_frame().dropna(subset=["patched"])
        columns = ("hook_point", "clean", "corrupted", "patched", "effect")
        return [PatchingResult(*row) for row in zip(*(frame[c] for c in columns), strict=True)]

    # -- files --------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the result as a new folder: ``manifest.json`` and three Parquet tables, no pickle.

        The folder takes its name only when it is complete. Raises :class:`StoreError` where
        something is there already; nothing is overwritten.
        """
        from patching.store import save  # it builds on results

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> "SweepResult":
        """The result that a folder holds, to the last bit; every file is held to its checksum.

        Reading runs no code. Raises :class:`StoreError` for a folder that is missing, incomplete,
        damaged, changed, or written by a newer version.
        """
        from patching.store import load

        return load(folder)

    def plot(self, **options: Any) -> Any:
        """A heatmap of the effects, as a matplotlib ``Figure``; see :func:`patching.plot.heatmap`."""
        from patching.plot import heatmap

        return heatmap(self, **options)

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write an interactive report, one HTML file for offline use; see :func:`patching.report.write`."""
        from patching.report import write

        return write(path, self, **options)

    def _repr_html_(self) -> str:
        """What a notebook shows of the result."""
        from patching.report import notebook

        return notebook(self)


@dataclass(frozen=True)
class Stability:
    """How much of a sweep's ``k`` strongest cells stays the same when the pairs are resampled."""

    k: int
    jaccard: float
    """Mean over resamples of the cells in both lists over the cells in either; 1 = the same list."""
    inclusion: np.ndarray  # [*axes]
    """The share of resamples in which each cell is among the ``k`` strongest."""


@dataclass(frozen=True)
class NullFloor:
    """How large effects get when the values come from another pair: see ``patcher.null_floor``."""

    floor: float
    """The quantile of the absolute effect over the null sweep's cells."""
    quantile: float
    null: SweepResult

    @classmethod
    def of(cls, null: SweepResult, quantile: float) -> "NullFloor":
        """The floor that a null sweep sets. Cells that did not move at all do not count: they are
        out of reach, and how many of them were swept must not lower the floor."""
        size = np.abs(null.effect())
        if np.isnan(size).all():
            return cls(float("nan"), quantile, null)
        moved = size[size > 0]
        return cls(float(np.quantile(moved, quantile)) if moved.size else 0.0, quantile, null)


SUMMARIES = ("ratio_of_means", "mean_of_ratios", "mean_difference")
AGGREGATES = (*SUMMARIES, "none")
CORRECTIONS = ("max_t", "bh", "none")
FRAME_COLUMNS = (
    "direction", "activation", "hook_point", "layer", "pos", "role", "token", "head", "neuron",
    "src_pos", "pair", "metric", "clean", "corrupted", "patched", "effect",
)  # fmt: skip


def _check_range(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise PatchingError(f"{name}={value} will not do: it is {expected}.")


def _warn_user(message: str) -> None:
    warnings.warn(message, PatchingWarning, stacklevel=3)


def _joined(names: Any) -> str:
    return "+".join(dict.fromkeys(names))


def _only(values: Any) -> Any:
    """The value all sites of a cell share, or None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _mean_over_pairs(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(-1)
    return np.where(count > 0, np.where(there, values, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def mean_effect(results: Sequence[PatchingResult]) -> float:
    """Mean effect of the records that have one; NaN where none has."""
    return float(_mean_over_pairs(np.array([result.patching_effect for result in results], float)))


def summarize_results(results: Mapping[str, Sequence[PatchingResult]], top_k: int = 10) -> None:
    """Print the ``top_k`` hook points with the largest absolute mean effect."""
    means = {name: mean_effect(records) for name, records in results.items()}
    ranked = sorted((item for item in means.items() if not np.isnan(item[1])), key=lambda item: -abs(item[1]))
    width = max((len(name) for name in means), default=0)
    print(f"Strongest {min(top_k, len(ranked))} of {len(means)} hook points by mean patching effect")
    print("(1 = the whole clean-corrupted gap, 0 = none of it; not bounded to 0..1)")
    for name, effect in ranked[:top_k]:
        print(f"  {name:<{width}}  {effect:+.3f}  {'█' * round(20 * min(abs(effect), 1.5))}")
    undefined = [name for name, effect in means.items() if np.isnan(effect)]
    if undefined:
        print(f"without a defined effect (clean and corrupted score the same): {', '.join(undefined)}")


def create_patching_heatmap(results: Mapping[str, Sequence[PatchingResult]], model: Any) -> Tensor:
    """Mean effects ``[n_layers, 2]`` of ``attn_out`` and ``mlp_out``; NaN where not patched."""
    heatmap = torch.full((int(model.cfg.n_layers), 2), float("nan"))
    for layer in range(len(heatmap)):
        for column, component in enumerate(("hook_attn_out", "hook_mlp_out")):
            records = results.get(f"blocks.{layer}.{component}", ())
            if records:
                heatmap[layer, column] = mean_effect(records)
    return heatmap
