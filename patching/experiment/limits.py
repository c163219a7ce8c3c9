"""What kinds of claims share: limits of numbers, cells inside blocks, and words for both."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from patching.experiment.cells import Cells, point
from patching.experiment.claims import Measured
from patching.sites import Grid
from patching.typed import Kind

NUMBER = (int, float)
LIMITS: dict[str, Kind] = {"value": NUMBER, "tolerance": NUMBER, "above": NUMBER, "below": NUMBER}


def strays(sweep: str, grids: Mapping[str, Grid], cells: Sequence[Cells], at: Cells) -> Iterator[str]:
    """Why cells are not single cells of a sweep, or do not lie in the block ``at``."""
    grid = grids[sweep]
    wrong = [*at.problems(sweep, grid), *(p for one in cells for p in one.problems(sweep, grid, one=True))]
    yield from wrong
    if not wrong:
        inside = {*at.index(grid.axes)}
        yield from (f"{one} lies outside {at}." for one in cells if one.index(grid.axes)[0] not in inside)


def points(at: Cells, axes: Mapping[str, tuple]) -> list[dict[Any, str]]:
    """What ``at`` selects on each axis, the same whatever the order of the axes."""
    chosen = [point(axes, int(cell)) for cell in at.index(axes)]
    return sorted(({a: str(p[a]) for a in sorted(p, key=str)} for p in chosen), key=str)


def limits(claim: Any) -> Iterator[str]:
    if claim.value is not None:
        yield (
            f"within {claim.tolerance:g} of {claim.value:+g}"
            if claim.tolerance
            else f"exactly {claim.value:g}"
        )
    if claim.above is not None:
        yield f"above {claim.above:+g}" if claim.above else "above 0"
    if claim.below is not None:
        yield f"below {claim.below:+g}" if claim.below else "below 0"


def limit_mistakes(claim: Any, enough: bool) -> Iterator[str]:
    if not [*limits(claim)] and not enough:
        yield "nothing to check: give value (with tolerance), above or below."
    if claim.tolerance and claim.value is None:
        yield "tolerance goes with value."
    if claim.tolerance < 0:
        yield f"tolerance={claim.tolerance:g} should be 0 or more."


def within(claim: Any, values: np.ndarray) -> np.ndarray:
    """Which values the limits of a claim allow; none that is NaN."""
    well = ~np.isnan(values)
    if claim.value is not None:
        well &= np.abs(values - claim.value) <= claim.tolerance
    if claim.above is not None:
        well &= values > claim.above
    if claim.below is not None:
        well &= values < claim.below
    return well


def extremes(of: Measured, effects: np.ndarray, cells: np.ndarray) -> dict[str, float]:
    """The effects of one cell, or the smallest and largest of several."""
    there = [int(c) for c in cells if not np.isnan(effects[c])] or [int(cells[0])]
    ends = (min(there, key=lambda c: effects[c]), max(there, key=lambda c: effects[c]))
    return {of.name(c): effects[c] for c in ends}


def span(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"all {low:.3g}" if low == high else f"from {low:+.3f} to {high:+.3f}"


def at_most(p: np.ndarray) -> str:
    return f"{'≤ ' if p.size > 1 else ''}{p.max():.2g}"


def nth(rank: int) -> str:
    ending = "th" if 10 <= rank % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"


def count(cells: np.ndarray) -> str:
    """``1 cell``, ``12 cells``."""
    return "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
