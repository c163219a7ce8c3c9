"""Many workers: units of a sweep on process pools, clusters or Ray, gathered and kept by one driver.

Workers compute; only the driver writes the store. A worker that dies is replaced and its unit run
again; a driver that dies goes on from its store. What workers return is what the driver would have
computed: the same units, each with its own base runs.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import torch

from patching.engine import Request
from patching.errors import MissingPackage, PatchingError
from patching.sites import Cell
from patching.submitit import Submitit, runs_jobs
from patching.units import Part, Parts, Unit
from patching.worker import FORKED, Errand, Job, Load, run_unit, submit

Run = Callable[[Request, str, int, Sequence[Unit]], Iterable[tuple[Unit, Part]]]
"""Runs units of a request and yields each as it ends, in any order."""


@dataclass(frozen=True)
class Workers:
    """Workers behind the ``concurrent.futures.Executor`` interface (process pools, dask), or submitit's.

    Every worker calls ``load`` once for its model, e.g. ``functools.partial(load_model, "gpt2-small")``,
    and the driver's and the worker's weights are compared. Without ``load`` the workers must be
    processes forked from this one: a new ``ProcessPoolExecutor`` with the ``fork`` method.
    """

    executor: Executor | Callable[[], Executor] | Any
    """A pool, or a function that makes one: then a pool that breaks is replaced, and shut down in the end.
    An executor of submitit has jobs instead; one that ends without an answer is submitted again."""
    load: Load | None = None
    threads: int = 1
    """Torch threads in each worker."""
    at_once: int | None = None
    """Units handed out at a time; by default twice the number of cores of this machine."""
    retries: int = 3
    """How often in a row workers may die without a unit coming back."""


@dataclass(frozen=True)
class RayWorkers:
    """Ray actors, each with a model of its own; Ray's scheduler places them.

    Without ``load`` the model travels through Ray's object store, once.
    """

    workers: int | None = None
    """How many; by default as many as the cluster has room for."""
    cpus: float = 1
    gpus: float = 0
    """Of each worker; parts of a GPU are shared."""
    load: Load | None = None
    threads: int = 1
    retries: int = 3
    """How often in a row workers may die without a unit coming back."""


def runner(executor: "Executor | Workers | RayWorkers | Literal['ray']") -> Run:
    """What runs units on the executor that was asked for."""
    if executor == "ray":
        return lambda *job: _on_ray(RayWorkers(), *job)
    if isinstance(executor, RayWorkers):
        return lambda *job: _on_ray(executor, *job)
    if isinstance(executor, Workers):
        return lambda *job: _on_executor(executor, *job)
    if isinstance(executor, Executor) or runs_jobs(executor):
        return lambda *job: _on_executor(Workers(executor), *job)
    raise PatchingError(
        "executor= takes a concurrent.futures.Executor, an executor of submitit, "
        f"patching.distributed.Workers or RayWorkers, or 'ray'; got {executor!r}."
    )


# -- executors --------------------------------------------------------------------------------------


def _on_executor(
    workers: Workers, request: Request, engine: str, seed: int, units: Sequence[Unit]
) -> Iterator[tuple[Unit, Part]]:
    """Units through an executor, each handed out again where its worker died."""
    with _errand(workers, request, engine, seed) as errand:
        yield from _handed_out(workers, errand, request, units)


@contextmanager
def _errand(workers: Workers, request: Request, engine: str, seed: int) -> Iterator[Errand]:
    """What workers are told; those that are forked find the job here meanwhile."""
    if workers.load is not None:
        job = Job.of(request, engine, seed, workers.threads)
        yield Errand(job.key, job, workers.load, workers.threads, os.getpid())
        return
    key = uuid4().hex
    FORKED[key] = Parts(request, engine, seed)
    try:
        yield Errand(key, None, None, workers.threads, os.getpid())
    finally:
        FORKED.pop(key)


def _handed_out(
    workers: Workers, errand: Errand, request: Request, units: Sequence[Unit]
) -> Iterator[tuple[Unit, Part]]:
    waiting, broken = deque(units), 0
    pool = _made(workers)
    at_once = workers.at_once or 2 * (os.cpu_count() or 1)
    running: dict[Future[Part], Unit] = {}
    try:
        while waiting or running:
            try:
                while waiting and len(running) < at_once:
                    unit = waiting[0]
                    cells = request.grid.cells[unit.cells.start : unit.cells.stop]
                    future = submit(pool, errand, unit, cells)
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    part = _result(future)
                    unit, broken = running.pop(future), 0
                    yield unit, part
            except BrokenExecutor as error:
                finished = [f for f in running if f.done() and not f.cancelled() and f.exception() is None]
                for future in finished:
                    yield running.pop(future), future.result()
                waiting.extendleft(running.values())
                running.clear()
                broken = 0 if finished else broken + 1
                pool = _replaced(workers, pool, broken, error)
    finally:
        for future in running:
            future.cancel()
        if callable(workers.executor):
            pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Part]) -> Part:
    try:
        return future.result()
    except Exception as error:
        if isinstance(error, PatchingError | BrokenExecutor) or "pickle" not in str(error).lower():
            raise
        raise PatchingError(
            f"what workers are told must be importable there, and something is not ({error}). Give load, "
            "metric and replacement as functions of a module, not as lambdas or functions inside others."
        ) from error


def _made(workers: Workers) -> Executor:
    """The pool that was given, or one made by the function that was."""
    pool = workers.executor() if callable(workers.executor) else workers.executor
    if isinstance(pool, Executor):
        return pool
    if not runs_jobs(pool):
        raise PatchingError(
            "Workers takes a concurrent.futures.Executor, an executor of submitit, or a function that makes "
            f"one; got {pool!r}."
        )
    if workers.load is None:
        raise PatchingError(
            "jobs of submitit load the model themselves: give Workers(executor, load=...), a function that "
            "loads it there."
        )
    return Submitit(pool, workers.retries)


def _replaced(workers: Workers, pool: Executor, broken: int, error: BrokenExecutor) -> Executor:
    """A new pool for one whose worker died; raises where that cannot be, or does not help."""
    if not callable(workers.executor):
        raise PatchingError(
            f"a worker died and its pool with it ({error}). Run the same sweep again with a new pool: with "
            "store= it goes on where it stopped. Workers(function that makes a pool) replaces it by itself."
        ) from error
    if broken > workers.retries:
        raise PatchingError(
            f"workers died {broken} times in a row and no unit came back ({error}). Is there memory for "
            "the model in each of them?"
        ) from error
    pool.shutdown(wait=False, cancel_futures=True)
    return _made(workers)


# -- Ray --------------------------------------------------------------------------------------------


def _on_ray(
    workers: RayWorkers, request: Request, engine: str, seed: int, units: Sequence[Unit]
) -> Iterator[tuple[Unit, Part]]:
    """Units over Ray actors; an actor that dies is replaced and its unit handed out again.

    An actor gets a unit once it is ready: where a node is lost and there is no room for another actor,
    those that are left do the work.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackage("executor='ray'", "ray", "ray") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    actor_class = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_Actor)
    job = ray.put(Job.of(request, engine, seed, workers.threads))
    model = None if workers.load is not None else ray.put(request.model.model)
    count = min(workers.workers or _room(ray.cluster_resources(), workers), len(units))
    waiting, idle, died = deque(units), list[Any](), 0
    busy: dict[Any, tuple[Unit | None, Any]] = {}

    def start() -> None:
        actor = actor_class.remote(job, workers.load, model)
        busy[actor.ready.remote()] = None, actor

    try:
        for _ in range(count):
            start()
        while waiting or any(unit is not None for unit, _ in busy.values()):
            while waiting and idle:
                unit, actor = waiting.popleft(), idle.pop()
                cells = request.grid.cells[unit.cells.start : unit.cells.stop]
                busy[actor.run.remote(unit, cells)] = unit, actor
            [done], _ = ray.wait([*busy], num_returns=1)
            ran, actor = busy.pop(done)
            try:
                part = ray.get(done)
            except ray.exceptions.RayActorError as error:
                died += 1
                if died > workers.retries:
                    raise PatchingError(f"Ray workers died {died} times in a row: {error}") from error
                if ran is not None:
                    waiting.appendleft(ran)
                start()
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            idle.append(actor)
            if ran is not None:
                died = 0
                yield ran, part
    finally:
        for actor in itertools.chain(idle, (actor for _, actor in busy.values())):
            ray.kill(actor)


class _Actor:
    """A Ray worker: a model of its own, and the units it is given."""

    def __init__(self, job: Job, load: Load | None, model: Any) -> None:
        torch.set_num_threads(job.threads)
        self.parts = job.parts(model if load is None else load())

    def ready(self) -> None:
        """Answers when the model is there."""

    def run(self, unit: Unit, cells: Sequence[Cell]) -> Part:
        """Run one unit."""
        return run_unit(self.parts, unit, cells)


def _room(resources: dict[str, float], workers: RayWorkers) -> int:
    """How many workers a cluster's processors have room for."""
    by_cpu = resources.get("CPU", 1) / workers.cpus if workers.cpus else float("inf")
    by_gpu = resources.get("GPU", 0) / workers.gpus if workers.gpus else float("inf")
    return max(1, int(min(by_cpu, by_gpu, 10_000)))
