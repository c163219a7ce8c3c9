"""Running edges with the method that was asked for, and how they were run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from patching.edges import exact
from patching.edges.attribution import points
from patching.edges.measure import Edges, attribute
from patching.edges.paths import MLPS, Paths, measure_paths
from patching.edges.sets import Runs, final_streams
from patching.engine.baseline import as_numpy
from patching.engine.readout import score_rows
from patching.engine.request import Outcome, with_reference
from patching.engine.verify import SAMPLES, sample, tolerance
from patching.errors import PatchingWarning
from patching.pairs import duplicates


def run_edges(
    asked: Edges, method: str, steps: int, rule: str, seed: int, progress: bool
) -> tuple[Outcome, dict[str, Any]]:
    """The metric with each edge patched, measured or estimated, and how it was done."""
    request = asked.request
    at = points(steps, rule) if method == "eap_ig" else None
    if repeated := duplicates(request.pairs):
        warnings.warn(repeated, PatchingWarning, stacklevel=3)
    with request.model.at_rest(), _bar(len(asked.edges) * len(request.pairs), progress) as step:
        if method == "exact":
            outcome = exact.measure(asked, step)
            return outcome, {"method": method, **_verified(asked, outcome, seed)}
        outcome = attribute(asked, at, step)
    facts = {"method": method}
    return outcome, facts if at is None else {**facts, "steps": steps, "rule": rule, "points": at}


def run_paths(asked: Paths, progress: bool) -> tuple[Outcome, dict[str, Any]]:
    """The metric with each sender patched along its paths to the receivers, and how it was done."""
    request = asked.request
    if repeated := duplicates(request.pairs):
        warnings.warn(repeated, PatchingWarning, stacklevel=3)
    cells = sum(map(bool, request.grid.cells))
    with request.model.at_rest(), _bar(cells * len(request.pairs), progress) as step:
        outcome = measure_paths(asked, step)
    facts = {"receivers": list(map(str, asked.receivers)), "mlps": MLPS[not asked.recomputed]}
    return outcome, {"method": "path_patching", **facts}


def _verified(asked: Edges, outcome: Outcome, seed: int) -> dict[str, Any]:
    """Compare a few edges of one pair with runs from the first layer on, in which every node is live."""
    request = asked.request
    row, some = sample(request, outcome, seed, SAMPLES)
    runs = Runs.of(request.model, request.base([row]), request.source([row]), [request.pairs[row].roles])
    final = final_streams(runs, [[asked.edges[i]] for i in some])
    clean = (runs.source if request.denoising else runs.base).logits
    scorer = with_reference(request, [row], clean)
    again = as_numpy(score_rows(request, scorer, request.indices([row]), final, runs.base.resid_pre[-1]))[
        :, 0
    ]
    difference = float(np.abs(again - outcome.cells[list(some), row]).max(initial=0.0))
    logits = float(runs.base.logits.abs().max())
    if difference > tolerance(request.model.dtype) * max(1.0, logits):
        warnings.warn(
            f"{len(some)} sampled edges lie up to {difference:.2g} from runs of the whole model with the "
            "same edges patched: do not rely on these effects.",
            PatchingWarning,
            stacklevel=4,
        )
    return {"verified_edges": len(some), "verified_difference": difference}


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, disable=not shown, desc="edges", unit="edge") as bar:
        yield bar.update
