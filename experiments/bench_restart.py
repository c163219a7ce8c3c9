"""How soon does a run of 10^5 units go on that has ended, or nearly?

    .venv/bin/python experiments/bench_restart.py

Question: all 105,600 sites of the soak's model (soak.py), each in a unit of its own. How long does the same
call take when every unit is on the disk but the tables are not written, and when the run is finished? To
fill the folder within a minute, one unit is run; the others keep its facts, with random values, and
they are forced to the disk all at once. Writing the tables ends with removing 10^5 small files, which some
disks are slow at; ``TMPDIR=/dev/shm`` has the folder in memory.
"""

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import _machine
from soak import model_and_dataset

from patching import ActivationPatcher, SweepResult
from patching.sites import Cell
from patching.store import Journal, files
from patching.store.journal import OpenJournal
from patching.units import Part, Parts, Unit

warnings.filterwarnings("ignore")


class StopError(Exception):
    """Where the tables would be written."""


@contextlib.contextmanager
def units_made_up() -> Any:
    """Within, only the first unit is run, and no run ends."""
    run, finish, fsync = Parts.run, OpenJournal.finish, os.fsync
    rng, ran = np.random.default_rng(0), list[Part]()

    def made_up(parts: Parts, unit: Unit, cells: Sequence[Cell]) -> Part:
        if not ran:
            ran.append(run(parts, unit, cells))
        outcome = ran[0].outcome
        return replace(ran[0], outcome=replace(outcome, cells=rng.normal(size=outcome.cells.shape)))

    def stop(*_: Any) -> None:
        raise StopError

    Parts.run, OpenJournal.finish, files.os.fsync = made_up, stop, lambda _: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Parts.run, OpenJournal.finish, files.os.fsync = run, finish, fsync  # type: ignore[method-assign]


def main() -> None:
    model, dataset = model_and_dataset()
    patcher = ActivationPatcher(model)

    def timed(folder: Path) -> tuple[SweepResult, str]:
        clock, processor = time.perf_counter(), time.process_time()
        result = patcher.sweep(
            dataset, "post", ("layer", "pos", "neuron"), pair_indices=[0], progress=False,
            store=Journal(folder, pairs=1, cells=1),
        )  # fmt: skip
        took = time.perf_counter() - clock, time.process_time() - processor
        return result, f"{took[0]:.1f} s by the clock, {took[1]:.1f} s of processor time"

    print(_machine(), flush=True)
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "run"
        with units_made_up(), contextlib.suppress(StopError):
            timed(folder)
        os.sync()
        print(f"{sum(1 for _ in (folder / 'parts').iterdir()):,} units on the disk", flush=True)
        first, took = timed(folder)
        print(f"the same call, which writes the tables: {took}", flush=True)
        again, took = timed(folder)
        print(f"the same call on the finished run: {took}")
        print(f"the same values: {np.array_equal(first.patched, again.patched, equal_nan=True)}")


if __name__ == "__main__":
    main()
