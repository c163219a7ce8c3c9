"""Does a long sweep survive? Kills, dead workers, a full disk and flipped bits, until it is done.

A sweep of 10^5 sites on a small random model is started in a process of its own, again and again. Every
few seconds something happens to it: the process gets ``kill -9``, one of its workers does, its disk (a
small tmpfs) fills up, or, between two starts, a byte of a finished part is flipped. It is started again
with the same arguments until it ends. Expected: a result equal bit for bit to that of an
undisturbed run, no finished unit lost, and no unit run again but those that were in flight.

    make soak ARGS="--minutes 30"          # needs root for the tmpfs; without it a full disk is simulated

Figures of the last run are in docs/scale.md.
"""

import argparse
import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from patching import ActivationPatcher, PromptPair, PromptPairDataset, SweepResult
from patching.distributed import Workers
from patching.errors import PatchingWarning, StoreError
from patching.store import Journal, files

FORK = multiprocessing.get_context("fork")
LAYERS, POSITIONS, PAIRS = 4, 24, 2
FULL = 3
"""Exit code of a run that found its disk full."""


def model_and_dataset(neurons: int = 1100) -> tuple[Any, PromptPairDataset]:
    """A random model of 4 × 24 × 1100 = 105,600 neuron sites, and two pairs of random tokens."""
    config = TransformerBridgeConfig(
        n_layers=LAYERS, d_model=16, n_ctx=POSITIONS, d_head=8, n_heads=2, d_vocab=50, d_mlp=neurons,
        act_fn="gelu_new", normalization_type="LN", seed=0,
    )  # fmt: skip
    model = TransformerBridge.boot_native(config)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(4, 50, (PAIRS, POSITIONS), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 0] = 4 + (clean[:, 0] - 3) % 46
    return model, PromptPairDataset(
        model, [PromptPair(a, b, 5, 9) for a, b in zip(clean, corrupted, strict=True)]
    )


def sweep(model: Any, dataset: PromptPairDataset, folder: Path, cells: int, workers: int) -> SweepResult:
    """The sweep that is to survive, here or on forked workers."""
    executor = Workers(lambda: ProcessPoolExecutor(workers, FORK), retries=50) if workers else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchingWarning)
        return ActivationPatcher(model).sweep(
            dataset, "post", ("layer", "pos", "neuron"), progress=False,
            store=Journal(folder, pairs=1, cells=cells), executor=executor,
        )  # fmt: skip


def attempt(job: tuple[Any, ...], mounted: bool, seed: int) -> None:
    """One start, in a process of its own."""
    if not mounted and seed % 5 == 0:
        fill_up_in_a_while(random.Random(seed))
    try:
        sweep(*job)
    except StoreError as error:
        if "disk is full" not in str(error):
            raise
        os._exit(FULL)


def fill_up_in_a_while(rng: random.Random) -> None:
    """Simulated: from some write on, the disk takes nothing more."""
    fsync, left = os.fsync, [rng.randrange(1, 40)]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    files.os.fsync = full  # type: ignore[assignment]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(
    process: Any, disk: Path, mounted: bool, rng: random.Random, happened: Counter[str], patience: float
) -> None:
    """Do something to a running sweep every now and then, until it ends."""
    process.join(rng.uniform(0.0, patience))
    while process.is_alive():
        match rng.choice(["kill", "kill", "kill", "worker", "full"]):
            case "kill":
                with_signal(process.pid)
                happened["kill -9"] += 1
                process.join()
            case "worker":
                for worker in children(process.pid)[:1]:
                    with_signal(worker)
                    happened["workers killed"] += 1
            case "full" if mounted:
                free = shutil.disk_usage(disk).free
                with contextlib.suppress(OSError), open(disk / "ballast", "wb") as ballast:
                    ballast.write(b"x" * max(0, free - rng.randrange(4096, 20_000)))
        process.join(rng.uniform(0.0, patience))
    (disk / "ballast").unlink(missing_ok=True)


def with_signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parts_in(folder: Path) -> set[str]:
    """The finished units on disk whose content agrees with the checksum in their names."""
    return {
        path.name
        for path in (folder / "parts").glob("*.safetensors")
        if hashlib.sha256(path.read_bytes()).hexdigest() in path.name
    }


def flip(folder: Path, kept: set[str], rng: random.Random, happened: Counter[str]) -> set[str]:
    """Now and then, flip a byte of a finished part; it must be noticed."""
    if not kept or rng.random() > 0.2:
        return kept
    name = rng.choice(sorted(kept))
    path = folder / "parts" / name
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    happened["parts damaged"] += 1
    return kept - {name}


def once(
    model: Any, dataset: PromptPairDataset, disk: Path, cells: int, mounted: bool, rng: random.Random,
    happened: Counter[str], patience: float,
) -> SweepResult:  # fmt: skip
    """One sweep, disturbed until it is done."""
    folder = disk / "run"
    shutil.rmtree(folder, ignore_errors=True)
    kept: set[str] = set()
    while True:
        job = (model, dataset, folder, cells, rng.choice([0, 0, 2]))
        process = FORK.Process(target=attempt, args=(job, mounted, rng.randrange(10**6)))
        process.start()
        happened["starts"] += 1
        disturb(process, disk, mounted, rng, happened, patience)
        happened["disk full"] += process.exitcode == FULL
        if process.exitcode not in (0, FULL, -signal.SIGKILL):
            raise SystemExit(f"a start ended with an error, after {dict(happened)}")
        finished = '"state": "finished"' in _head(folder)
        now = parts_in(folder)
        if not finished:
            happened["units lost"] += len(kept - now)
        if process.exitcode == 0:
            return SweepResult.load(folder)
        kept = flip(folder, now, rng, happened) if not finished else now


def _head(folder: Path) -> str:
    try:
        with open(folder / "manifest.json", encoding="utf-8") as file:
            return file.read(200)
    except OSError:
        return ""


def same_bits(a: SweepResult, b: SweepResult) -> bool:
    names = ("clean", "corrupted", "patched")
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new sweep after this long")
    parser.add_argument("--kills", type=int, default=200, help="or after this many kills")
    parser.add_argument("--cells", type=int, default=800, help="sites in a unit")
    parser.add_argument("--neurons", type=int, default=1100, help="in a layer: 96 sites for each")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds between two of them, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # forked processes must not share a pool of threads
    rng, happened, started = random.Random(given.seed), Counter[str](), time.time()
    model, dataset = model_and_dataset(given.neurons)
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        try:
            clean = sweep(model, dataset, Path(scratch) / "clean", given.cells, 0)
            seconds = time.time() - started
            print(
                f"{clean.patched[..., 0].size:,} sites × {PAIRS} pairs, undisturbed: {seconds:.0f} s",
                flush=True,
            )
            print("disk: a tmpfs of 24 MB" if mounted else "disk: full disks are simulated (no tmpfs here)")
            while happened["kill -9"] < given.kills and time.time() - started < given.minutes * 60:
                happened["sweeps"] += 1
                got = once(model, dataset, disk, given.cells, mounted, rng, happened, given.patience)
                happened["wrong results"] += not same_bits(got, clean)
                print(f"{time.time() - started:6.0f} s  {dict(happened)}", flush=True)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
    bad = happened["wrong results"] + happened["units lost"]
    raise SystemExit(f"{bad} things went wrong" if bad else 0)


if __name__ == "__main__":
    main()
