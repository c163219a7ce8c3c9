"""Long sweeps: unit by unit, kept on disk as they end, here or on many workers."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from patching.collect import collect, names_of, provenance, versions
from patching.dataset import PatchingDataset
from patching.distributed import Run, runner
from patching.engine import Request
from patching.engine.forced import ByAnswer
from patching.errors import PatchingWarning, StoreError
from patching.grid import Asked
from patching.identity import canonical, code_identity, plain, sha256
from patching.interventions import REPLACEMENTS, Custom, Replacement
from patching.metrics import METRICS, AnswerScorer, CallableScorer, PairScorer, Scorer
from patching.results import Direction, SweepResult
from patching.run import bar, ready, repeats
from patching.store.folder import describe
from patching.store.journal import Journal, OpenJournal, journal
from patching.store.tables import site_row
from patching.units import Part, Parts, Size, Unit, cut, joined, size_of


def long_sweep(
    dataset: PatchingDataset,
    request: Request,
    activation: Asked,
    direction: Direction,
    *,
    engine: str,
    seed: int,
    progress: bool,
    store: str | Path | Journal | None,
    executor: Any = None,
) -> SweepResult:
    """A sweep by units: those that the store has are read, the others run and kept as they end."""
    asked = store if isinstance(store, Journal) or store is None else Journal(store)
    if asked is not None and not isinstance(asked.folder, str | Path):
        raise StoreError(f"store= takes a folder or a Journal, got {store!r}.")
    size = _size(request, engine, asked)
    with ExitStack() as stack:
        kept = None
        if asked is not None:
            shape = describe(
                request.grid.axes, names_of(activation), direction, request.scorer.name, len(request.pairs)
            )
            run = identity(dataset, request, engine, seed)
            kept = stack.enter_context(journal(asked, run, shape, size, environment(request)))
            if kept.finished:
                return kept.result()
            size = kept.size
        parts = _run(
            request,
            engine,
            seed,
            progress,
            cut(request, size),
            kept,
            _here if executor is None else runner(executor),
        )
        outcome, facts = joined(request, parts)
        for message in [*repeats(request), *facts.pop("warnings", [])]:
            warnings.warn(message, PatchingWarning, stacklevel=3)
        result = collect(dataset, request, outcome, activation, direction)
        result.provenance.update(plain(facts), seed=seed, units=vars(size))
        if kept is not None:
            result.provenance["sessions"] = kept.manifest["run"]["sessions"]
            kept.finish(result)
        return result


def _run(
    request: Request, engine: str, seed: int, progress: bool, units: Sequence[Unit],
    kept: OpenJournal | None, workers: Run,
) -> Iterator[tuple[Unit, Part]]:  # fmt: skip
    """Every unit with what it measured, those first that are on disk already."""
    done: set[int] = set()
    with bar(request, progress) as step:
        for unit, part in kept.read(units) if kept else ():
            done.add(unit.number)
            step(_runs(request, unit))
            yield unit, part
        missing = [unit for unit in units if unit.number not in done]
        for unit, part in workers(request, engine, seed, missing) if missing else ():
            if kept:
                kept.keep(unit, part)
            step(_runs(request, unit))
            yield unit, part


def _runs(request: Request, unit: Unit) -> int:
    return len(unit.rows) * sum(map(bool, request.grid.cells[unit.cells.start : unit.cells.stop]))


def _here(request: Request, engine: str, seed: int, units: Sequence[Unit]) -> Iterator[tuple[Unit, Part]]:
    """Run units one after the other in this process."""
    with ready(request):
        parts = Parts(request, engine, seed)
        for unit in units:
            yield unit, parts(unit)


def _size(request: Request, engine: str, asked: Journal | None) -> Size:
    """The size that was asked for, where it was, else one at which a unit takes about half a minute."""
    usual = size_of(request, engine)
    if asked is None:
        return usual
    return Size(
        usual.pairs if asked.pairs is None else asked.pairs,
        usual.cells if asked.cells is None else asked.cells,
    )


# -- what a run is ----------------------------------------------------------------------------------


def identity(dataset: PatchingDataset, request: Request, engine: str, seed: int) -> dict[str, Any]:
    """Everything that must be the same for a stopped run to go on, as plain values."""
    known = provenance(dataset, request)
    same = (
        "model", "model_class", "dtype", "weights_sha256", "weight_processing", "config", "dataset",
        "dataset_parameters", "dataset_sha256", "pairs", "direction",
    )  # fmt: skip
    return {
        **{key: known[key] for key in same},
        "axes": {
            name: sha256(canonical(plain(map(str, values)))) for name, values in request.grid.axes.items()
        },
        "cells_sha256": sha256(canonical([[site_row(site) for site in cell] for cell in request.grid.cells])),
        "replacement": _replacement(request.replacement),
        "metric": _metric(request.scorer),
        "noise": None if request.noise is None else plain(torch.cat([*request.noise])),
        "engine": engine,
        "max_rows": request.max_rows,
        "seed": seed,
    }


def _replacement(replacement: Replacement) -> dict[str, Any]:
    """A replacement by name and fields; one of the user's by its code too."""
    if isinstance(replacement, Custom):
        return {"name": replacement.name, "code": code_identity(replacement.function)}
    names: list[str] = [field.name for field in fields(replacement)] if is_dataclass(replacement) else []
    own = plain({name: getattr(replacement, name) for name in names})
    built_in = any(type(replacement) is type(make(0)) for make in REPLACEMENTS.values())
    code = {} if built_in else {"code": code_identity(type(replacement))}
    return {"name": replacement.name, **own, **code}


def _metric(scorer: Scorer) -> dict[str, Any]:
    """A metric by name; one of the user's by its code too."""
    if isinstance(scorer, AnswerScorer | ByAnswer):
        built_in = METRICS.get(scorer.name) is scorer.metric
        return {"name": scorer.name, **({} if built_in else {"code": code_identity(scorer.metric.score)})}
    if isinstance(scorer, CallableScorer):
        return {"name": scorer.name, "code": code_identity(scorer.function)}
    if isinstance(scorer, PairScorer):
        return {"name": scorer.name, "code": code_identity(scorer.compute_metric)}
    return {"name": scorer.name, "code": code_identity(type(scorer))}


def environment(request: Request) -> dict[str, Any]:
    """What may change between starts of one run, and bits with it."""
    return {
        "versions": versions(),
        "device": request.model.device.type,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
