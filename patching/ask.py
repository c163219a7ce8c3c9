"""Asking: from a sweep's arguments to a request, every one of them checked before anything runs."""

from collections.abc import Sequence
from typing import Any

from patching.dataset import PatchingDataset
from patching.engine import Request
from patching.errors import InterventionError, PatchingError, unknown
from patching.gradients import GradientMethod, method_of
from patching.gradients.method import check_engine
from patching.grid import Choice, grid
from patching.interventions import Replacement, replacement_of
from patching.models.face import LanguageModel
from patching.pairs import scorer_of, token_pairs

DIRECTIONS = ("denoising", "noising")
ENGINES = ("auto", "reference")


def asked(
    model: LanguageModel, dataset: PatchingDataset, activation: Any, over: Sequence[str], *, direction: str,
    replacement: Any, metric: Any, layers: Any, positions: Any, heads: Any, window: int,
    pair_indices: Any, method: str | GradientMethod, engine: str, max_rows: int | None, seed: int,
) -> Request:  # fmt: skip
    """The request that a sweep's arguments make, every one of them checked."""
    check_choices(direction=direction, method=method, engine=engine, max_rows=max_rows, seed=seed)
    request = request_of(
        model,
        dataset,
        activation,
        over,
        direction=direction,
        replacement=replacement_of(replacement, seed),
        metric=metric,
        choice=Choice(layers, positions, heads, window),
        pair_indices=pair_indices,
        max_rows=max_rows,
    )
    if gradient := method_of(method):
        gradient.check(request)
    return request


def request_of(
    model: LanguageModel,
    dataset: PatchingDataset,
    activation: Any,
    over: Sequence[str],
    *,
    direction: str = "denoising",
    replacement: Replacement | None = None,
    metric: Any = None,
    choice: Choice = Choice(),
    pair_indices: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> Request:
    """The request for cells of a grid on pairs of a dataset; raises naming every problem of both."""
    pairs = token_pairs(model, dataset, pair_indices)
    roles = list(dict.fromkeys(role for pair in pairs for role in pair.roles))
    cells = grid(
        activation, over, model.shape,
        n_pos=max(map(len, pairs)), roles=roles, choice=choice,
    )  # fmt: skip
    request = Request(
        model,
        pairs,
        cells,
        replacement or replacement_of("paired", 0),
        scorer_of(metric, dataset, pairs, model),
        direction == "denoising",
        max_rows,
    )
    bad = [p for rows in request.lengths() for p in _replacement_problems(request, rows)]
    if bad:
        raise InterventionError("\n".join(dict.fromkeys(bad)))
    return request


def check_choices(
    *, direction: str, method: str | GradientMethod, engine: str, max_rows: int | None, seed: int
) -> None:
    """Raise for a choice that does not exist, naming those that do."""
    if direction not in DIRECTIONS:
        raise PatchingError(unknown("direction", direction, DIRECTIONS))
    gradient = method_of(method)
    if engine not in ENGINES:
        raise PatchingError(unknown("engine", engine, ENGINES))
    if gradient:
        check_engine(gradient.name, engine)
    if max_rows is not None and max_rows < 1:
        raise PatchingError(f"max_rows={max_rows} has no room for one pair; it is at least 1.")
    if seed < 0:
        raise PatchingError(f"seed={seed} cannot seed a generator; it is at least 0.")


def _replacement_problems(request: Request, rows: Sequence[int]) -> list[str]:
    clusters = [[request.pairs[rows[p]].index for p in places] for places in request.clusters(rows)]
    return request.replacement.check(clusters)
