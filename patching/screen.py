"""Screen, then verify: estimates for all cells, patched runs for the strongest and for a random audit.

A screen by gradients is fast and sometimes wrong, and what it overlooks does not show among what it
finds. So a random sample of the cells that it passed over is patched too: how many of them turn out to
matter bounds how many there are (:mod:`patching.screen_result`).
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from patching.collect import collect
from patching.dataset import PatchingDataset
from patching.engine import Request
from patching.errors import PatchingError, PatchingWarning
from patching.gradients.moves import moves
from patching.grid import Asked
from patching.results import SweepResult
from patching.run import run
from patching.screen_result import Cells, ScreenResult
from patching.sites import Grid


def verified(
    dataset: PatchingDataset,
    request: Request,
    activation: Asked,
    estimate: SweepResult,
    *,
    verify: int,
    audit: int,
    seed: int,
    progress: bool,
) -> ScreenResult:
    """An estimate of all cells of a request, with patched runs of the strongest and of a random audit."""
    choice = choose(estimate, moves(request), verify, audit, seed)
    cells = tuple(request.grid.cells[number] for number in choice.patched)
    few = replace(request, grid=Grid({"cell": tuple(choice.patched.tolist())}, cells))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* repeat the prompts", PatchingWarning)  # the estimate said so
        outcome, facts = run(few, "auto", seed, progress)
    measured = collect(dataset, few, outcome, activation, estimate.direction)
    measured.provenance.update(facts, seed=seed)
    exact = spread(measured, estimate, choice)
    return ScreenResult(estimate, exact, choice.verified, choice.audited, choice.still, choice.population)


@dataclass(frozen=True)
class Choice:
    """Which cells of a screen are patched."""

    verified: Cells
    audited: Cells
    still: Cells
    population: int

    @property
    def patched(self) -> Cells:
        return np.concatenate([self.verified, self.audited])


def choose(
    estimate: SweepResult, moving: Bool[np.ndarray, " cell"], verify: int, audit: int, seed: int
) -> Choice:
    """The ``verify`` strongest cells, and ``audit`` of the others at random without replacement."""
    size = np.abs(estimate.effect("mean_difference").ravel())
    there = ~np.isnan(size)
    able = np.flatnonzero(there & moving)
    ranked = able[np.argsort(-size[able], kind="stable")]
    rest = ranked[verify:]
    drawn = np.random.default_rng(seed).permutation(rest)[:audit]
    return Choice(ranked[:verify], drawn, np.flatnonzero(there & ~moving), len(rest))


def check_counts(verify: int, audit: int) -> None:
    """Raise for numbers of cells that say nothing."""
    if verify < 0 or audit < 0 or verify + audit == 0:
        raise PatchingError(
            f"verify={verify} and audit={audit} patch nothing: each is at least 0, one of them at least 1."
        )


def spread(measured: SweepResult, estimate: SweepResult, choice: Choice) -> SweepResult:
    """Measurements of the chosen cells on the axes of the screen; the base run's where cells are still."""
    base = measured.corrupted if estimate.direction == "denoising" else measured.clean
    patched = np.full((len(estimate.cells), len(base)), np.nan)
    patched[choice.still] = np.where(
        np.isnan(estimate.patched.reshape(patched.shape)[choice.still]), np.nan, base
    )
    patched[choice.patched] = measured.patched
    return replace(
        measured,
        axes=estimate.axes,
        cells=estimate.cells,
        patched=patched.reshape(estimate.patched.shape),
        activation=estimate.activation,
    )
