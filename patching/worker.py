"""A worker: a process that gets the model and the request once, runs units, and ends with its driver."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from patching.engine import Request
from patching.engine.request import TokenPair
from patching.errors import PatchingError
from patching.identity import weight_hash
from patching.models import face_of
from patching.run import ready
from patching.sites import Cell, Grid
from patching.units import Part, Parts, Unit

Load = Callable[[], Any]
"""Gives a worker its model: a function without arguments that every worker can import."""


@dataclass(frozen=True)
class Job:
    """A request without its model and cells, for a worker to keep."""

    key: str
    request: Request
    pairs: tuple[tuple[Any, ...], ...]
    weights: str
    engine: str
    seed: int
    threads: int

    @classmethod
    def of(cls, request: Request, engine: str, seed: int, threads: int) -> "Job":
        """Token ids travel as arrays: hundreds of shared tensors would exhaust a system's file handles."""
        pairs = tuple(
            (p.index, _array(p.clean), _array(p.corrupted), p.roles, p.template) for p in request.pairs
        )
        bare: Any = replace(request, model=None, pairs=(), grid=Grid({}, ()))  # type: ignore[arg-type]
        return cls(uuid4().hex, bare, pairs, weight_hash(request.model.model), engine, seed, threads)

    def parts(self, model: Any) -> Parts:
        """The job on a worker's own model; :class:`PatchingError` where that is another one."""
        face = face_of(model)
        if weight_hash(face.model) != self.weights:
            raise PatchingError(
                "load() gave a worker a model with other weights than the sweep's. It has to load and "
                "change the model just as you did: name, precision, folded weights."
            )

        def tokens(ids: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(ids, device=face.device)

        pairs = [TokenPair(i, tokens(clean), tokens(other), *rest) for i, clean, other, *rest in self.pairs]
        return Parts(replace(self.request, model=face, pairs=pairs), self.engine, self.seed)


def _array(tokens: torch.Tensor) -> np.ndarray:
    return tokens.cpu().numpy()


def run_unit(parts: Parts, unit: Unit, cells: Sequence[Cell]) -> Part:
    """Run one unit on a worker's model."""
    part = replace(parts.request, grid=Grid({}, tuple(cells)))
    with ready(part):
        return parts.run(unit, cells)


FORKED: dict[str, Parts] = {}
"""Jobs of this process, for the processes that are forked from it."""
_LOADED: dict[str, Parts] = {}
"""The job that this worker has its model for."""
_TURNS = threading.Lock()
"""Threads share one model, whose hooks are its own: they take turns."""


@dataclass(frozen=True)
class Errand:
    """What a worker of an executor is told with every unit."""

    key: str
    job: Job | None
    """None where workers are forked and have it already."""
    load: Load | None
    threads: int
    driver: int
    """The process that sent it."""

    def parts(self) -> Parts:
        """The job on this worker's model, which is loaded once."""
        if self.job is None and self.key in FORKED:
            return FORKED[self.key]
        if self.job is None or self.load is None:
            raise PatchingError(
                "this pool's processes do not have the model: they were started before the sweep, or "
                "not forked. Give Workers(pool, load=...), a function that loads it there."
            )
        if self.key not in _LOADED:
            _LOADED.clear()
            _LOADED[self.key] = self.job.parts(self.load())
        return _LOADED[self.key]


def work(errand: Errand, unit: Unit, cells: Sequence[Cell]) -> Part:
    """What a worker does: get the model once, then run units."""
    with _TURNS:
        if os.getpid() != errand.driver:
            _settle(errand.threads)
        return run_unit(errand.parts(), unit, cells)


_SETTLED: set[int] = set()
_BOUND: set[int] = set()
"""Processes that know their threads, and that end with the driver."""
_FORKING = threading.local()
"""Which process is about to fork workers, in the thread that does."""


def _settle(threads: int) -> None:
    """Once in a worker process: its threads, and an end when the driver ends."""
    if os.getpid() in _SETTLED:
        return
    _SETTLED.add(os.getpid())
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before this process had come to its first unit
        os._exit(1)
    _bind(os.getppid())


def _bind(parent: int) -> None:
    """A pool's processes outlive a killed driver, and would hold on to its memory: this one ends with it."""
    if os.getpid() not in _BOUND:
        _BOUND.add(os.getpid())
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _forked() -> None:
    """In a process just forked for a pool, which may wait for its first unit when the driver dies."""
    driver = getattr(_FORKING, "driver", None)
    if driver is not None:
        _FORKING.driver = None
        _bind(driver)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is forked
    os.register_at_fork(after_in_child=_forked)


def submit(pool: Executor, errand: Errand, unit: Unit, cells: Sequence[Cell]) -> Future[Part]:
    """Hand out a unit; a pool may fork its processes for it."""
    _FORKING.driver = os.getpid()
    try:
        return pool.submit(work, errand, unit, cells)
    finally:
        _FORKING.driver = None
