"""What keeping a sweep on disk costs, and how two Ray workers compare with one process.

    .venv/bin/python experiments/bench_scale.py

Question: a sweep of z over layer × pos × head on a random model of GPT-2 small's shape, the prompts of each
pair differing from position 10 on. How long does it take in one process with all threads, the same with
``store=``, and with ``executor="ray"``: as many actors as there are cores, of one thread each? The model
travels to them through Ray's object store; their start is part of the time. All four give the same values.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import _machine, gpt2_shape, random_pairs

from patching import ActivationPatcher, SweepResult
from patching.distributed import RayWorkers
from patching.store.journal import OpenJournal

warnings.filterwarnings("ignore")


def timed(patcher: ActivationPatcher, dataset: Any, **options: Any) -> tuple[SweepResult, float]:
    started = time.perf_counter()
    result = patcher.sweep(dataset, "z", ("layer", "pos", "head"), progress=False, **options)
    return result, time.perf_counter() - started


def seconds_of_keeping() -> list[float]:
    """From now on, what writing each unit takes is added to the list."""
    kept, keep = [], OpenJournal.keep

    def clocked(journal: OpenJournal, *unit: Any) -> None:
        started = time.perf_counter()
        keep(journal, *unit)
        kept.append(time.perf_counter() - started)

    OpenJournal.keep = clocked  # type: ignore[method-assign]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a store, and of Ray.")
    parser.add_argument("--pairs", type=int, default=48)
    args = parser.parse_args()
    model = gpt2_shape()
    dataset, patcher = random_pairs(model, 10, args.pairs), ActivationPatcher(model)
    timed(patcher, dataset, pair_indices=[0], layers=[11])
    kept, workers = seconds_of_keeping(), torch.get_num_threads()
    print(_machine(), flush=True)
    here, first = timed(patcher, dataset)
    print(f"one process, {workers} threads: {first:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stored, with_store = timed(patcher, dataset, store=Path(folder) / "run")
    size, units = stored.provenance["units"], len(kept)
    print(
        f"the same with store=: {with_store:.1f} s, {units} units of {size['pairs']} pairs × {size['cells']} "
        f"cells; {1000 * sum(kept) / units:.0f} ms to keep each, {sum(kept) / with_store:.2%} of the time",
        flush=True,
    )
    on_ray, spread = timed(patcher, dataset, executor=RayWorkers(workers=workers))
    _, again = timed(patcher, dataset)
    print(f"{workers} Ray workers of one thread: {spread:.1f} s; one process once more: {again:.1f} s")
    print(f"Ray against the best single process: {spread / min(first, again):.2f} ×")
    print(f"largest difference: {max(np.abs(here.patched - r.patched).max() for r in (stored, on_ray)):.1e}")


if __name__ == "__main__":
    main()
