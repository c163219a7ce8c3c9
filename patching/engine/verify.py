"""Verification: a seeded sample of every sweep is run again, as the reference engine does it."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from patching.engine import reference
from patching.engine.baseline import shared_values, what_is_written
from patching.engine.request import Outcome, Request, with_clean_runs
from patching.sites import Grid

SAMPLES = 3
"""Cells, or edges, of one pair that every measurement computes twice."""


@dataclass(frozen=True)
class Verification:
    """How far the sampled values lie from the reference engine's."""

    cells: tuple[int, ...]
    pair: int | None
    difference: float
    """The largest absolute difference of the metric."""
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed

    def facts(self) -> dict[str, int | float]:
        return {"verified_cells": len(self.cells), "verified_difference": self.difference}


def tolerance(dtype: torch.dtype) -> float:
    """How far two computations of the same number may lie apart, relative to its size."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)


def verify(request: Request, outcome: Outcome, seed: int, samples: int = SAMPLES) -> Verification:
    """Compare sampled cells of one sampled pair with the reference engine's values."""
    row, cells = sample(request, outcome, seed, samples)
    if not cells:
        return Verification((), None, 0.0, 0.0)
    expected, logits = _reference(request, row, cells)
    values = outcome.cells[:, row]
    scale = max(np.abs([*expected, outcome.clean[row], outcome.corrupted[row]]))
    # Scores are differences of logits: they carry the rounding of the logits, not of their own size.
    rounding = 64 * torch.finfo(request.model.dtype).eps * logits
    return Verification(
        cells,
        request.pairs[row].index,
        float(np.abs(values[list(cells)] - expected).max()),
        float(tolerance(request.model.dtype) * scale + rounding),
    )


def sample(request: Request, outcome: Outcome, seed: int, samples: int) -> tuple[int, tuple[int, ...]]:
    """The row of a pair and the cells in which it is measured again.

    Cells that were computed are drawn; exact zeros only where there are no others.
    """
    rng = np.random.default_rng(seed)
    row = int(rng.integers(len(request.pairs)))
    base = (outcome.corrupted if request.denoising else outcome.clean)[row]
    values = outcome.cells[:, row]
    there = np.flatnonzero(~np.isnan(values))
    moved = there[values[there] != base]
    drawn = rng.permutation(moved if len(moved) else there)[:samples]
    return row, tuple(int(cell) for cell in drawn)


def _reference(request: Request, row: int, cells: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The reference engine's values of some cells in one pair, and the size of its logits."""
    few = replace(request, grid=Grid({}, tuple(request.grid.cells[cell] for cell in cells)))
    rows = next(group for group in request.lengths() if row in group)
    shared = {name: v[[rows.index(row)]] for name, v in shared_values(few, rows).items()}
    values, scorer = what_is_written(few, [row], shared), with_clean_runs(few, [row])
    logits = reference.CellRunner(few, [row], values).run(few.grid.cells)
    scores = [float(scorer(some, few.indices([row]))) for some in logits]
    return np.array(scores), max(float(some.abs().max()) for some in logits)
