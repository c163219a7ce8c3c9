"""Jobs of submitit, on SLURM or on this machine, behind the interface of ``concurrent.futures``."""

import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

SECONDS = 1.0
"""Between two looks at the jobs."""


def runs_jobs(executor: Any) -> bool:
    """Whether it is an executor of submitit; where nobody has imported that, there is none."""
    submitit = sys.modules.get("submitit")
    return submitit is not None and isinstance(executor, submitit.Executor)


@dataclass
class _Call:
    """What a job was submitted for."""

    job: Any
    function: Callable[[], Any]
    retries: int


class Submitit(Executor):
    """An executor of submitit whose jobs are futures, each looked at every second.

    A job that ends without an answer, since its node died or its time was up, is submitted again,
    up to ``retries`` times. One whose future is cancelled is cancelled.
    """

    def __init__(self, executor: Any, retries: int) -> None:
        self._executor = executor
        self._retries = retries
        self._calls: dict[Future[Any], _Call] = {}
        self._lock = threading.Lock()
        self._watching = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a job; what it answers."""
        function, future = partial(fn, *args, **kwargs), Future[Any]()
        with self._lock:
            self._calls[future] = _Call(self._executor.submit(function), function, self._retries)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, daemon=True).start()
        future.add_done_callback(self._drop)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel the jobs that run, wait for them, or neither."""
        if cancel_futures:
            for future in [*self._calls]:
                future.cancel()
        if wait:
            futures.wait([*self._calls])

    def _drop(self, future: Future[Any]) -> None:
        with self._lock:
            call = self._calls.pop(future, None)
        if call is not None and future.cancelled():
            call.job.cancel(check=False)

    def _watch(self) -> None:
        while True:
            with self._lock:
                calls = [*self._calls.items()]
                self._watching = bool(calls)
            if not calls:
                return
            for future, call in calls:
                try:
                    self._look(future, call)
                except Exception as error:  # else nobody would wait for the others
                    if future.set_running_or_notify_cancel():
                        future.set_exception(error)
            time.sleep(SECONDS)

    def _look(self, future: Future[Any], call: _Call) -> None:
        """Pass on what a job has answered; submit it again where it has not."""
        from submitit.core.utils import FailedJobError

        if future.cancelled() or not call.job.done():
            return
        error = call.job.exception()
        if error is not None and not isinstance(error, FailedJobError) and call.retries:
            with self._lock:  # a future that is cancelled meanwhile cancels this job, not the last one
                if not future.cancelled():
                    call.job, call.retries = self._executor.submit(call.function), call.retries - 1
            return
        answer = call.job.result() if error is None else None
        if future.set_running_or_notify_cancel():
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(error)
