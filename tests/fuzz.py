"""Coverage-guided fuzzing of every reader of files: atheris looks for inputs that reach new lines of ours.

    python tests/fuzz.py [READER ...] [--runs N] [--jobs N] [--seed N]

Each reader is fed in a process of its own, until N inputs are through or one crashes it: with any error but a
PatchingError, by hanging, or by taking too much memory. That input is kept, and the exit code is not 0.
The readers, their valid files and the ways to change them are those of readers.py, which the tests use too.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

KEPT = Path(__file__).parents[1] / "build" / "fuzz"
"""Where inputs that crash a reader are kept."""
LIMITS = ("-timeout=300", "-rss_limit_mb=4096")
"""Seconds and memory after which an input has crashed its reader.

Every half of the seconds atheris looks at the clock, in whatever function that comes upon: within the few
that have no builtins, as a ``NamedTuple`` is made, it stops at a KeyError of its own. So it looks rarely.
"""
IN_MEMORY = Path("/dev/shm")
"""Files here are never on a disk; on systems without it they lie where temporary files do."""
COLUMNS = "{:<12} {:>12} {:>10} {:>15} {:>8}".format


class Counts(NamedTuple):
    """What was fed to a reader."""

    inputs: int
    valid: int
    seconds: float


def counting(read: Callable[[bytes], bool], file: Path) -> Callable[[bytes], None]:
    """One input read and counted, in a file, which outlives a process that crashes. Errors go up."""
    counts = np.memmap(file, np.float64, "w+", shape=len(Counts._fields))
    began = time.perf_counter()

    def judge(content: bytes) -> None:
        counts[0] += 1
        try:
            counts[1] += read(content)
        finally:
            counts[2] = time.perf_counter() - began

    return judge


def counted(file: Path) -> Counts:
    """What :func:`counting` has written; nothing where it was not reached."""
    numbers = np.fromfile(file, np.float64) if file.exists() else np.zeros(3)
    return Counts(int(numbers[0]), int(numbers[1]), float(numbers[2]))


def feed(name: str, folder: Path, runs: int, *flags: str) -> None:
    """Feed one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["patching"]):
        import readers

    def changed(content: bytes, longest: int, seed: int) -> bytes:
        """By turns what libFuzzer changes in bytes, and what we change in what they hold."""
        other = readers.changed(name, content, Random(seed)) if seed % 2 else content
        return other if content != other and len(other) <= longest else atheris.Mutate(content, longest)

    corpus, place = folder / "corpus", folder / "files"
    corpus.mkdir()
    place.mkdir()
    (corpus / "valid").write_bytes(readers.READERS[name].valid)
    fed = counting(lambda content: readers.read_anything(name, content, place), folder / "counts")
    numbers = itertools.count(1)

    def judge(content: bytes) -> None:
        fed(content)
        if next(numbers) == runs:  # an orderly end may be none: Arrow's threads wait for Python, it for them
            os._exit(0)

    atheris.Setup([name, *LIMITS, *flags, str(corpus)], judge, custom_mutator=changed)
    atheris.Fuzz()


def crashes(name: str, runs: int, seed: int) -> bool:
    """Feed one reader in another process; print its row of the table, and what crashed it if anything did."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        flags = (f"-seed={seed}", f"-artifact_prefix={KEPT}/{name}-")
        command = [sys.executable, __file__, "--feed", name, folder, str(runs), *flags]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        counts = counted(Path(folder) / "counts")
    crashed = done.returncode != 0 or counts.inputs < runs
    rate = counts.inputs / counts.seconds if counts.seconds else 0
    row = COLUMNS(name, f"{counts.inputs:,}", f"{rate:,.0f}", f"{counts.valid:,}", int(crashed))
    print("\n".join([row, *story(done.stdout) * crashed]), flush=True)
    return crashed


def story(log: str) -> list[str]:
    """The end of what a process said that crashed, and where the input is."""
    said = [line for line in log.splitlines() if not line.startswith(("INFO", "#"))]
    kept = re.findall(r"Test unit written to (.*)", log)
    return [*(f"    {line}" for line in said[-20:]), f"    kept: {kept[0] if kept else 'nothing'}"]


def main(argv: Sequence[str] | None = None) -> int:
    import readers

    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(readers.READERS)}; all")
    asked.add_argument("--runs", type=int, default=100_000, help="inputs for each reader")
    asked.add_argument("--jobs", type=int, default=os.cpu_count(), help="readers that are fed at once")
    asked.add_argument("--seed", type=int, default=0, help="of the inputs; 0 is another one each time")
    args = asked.parse_args(argv)
    if find_spec("atheris") is None:
        asked.error(
            "atheris is not installed; on Linux (x86_64) with Python 3.11 to 3.13, `make fuzz` does it"
        )
    unknown = set(args.readers) - set(readers.READERS)
    if unknown:
        asked.error(f"unknown readers: {', '.join(sorted(unknown))}; there are {', '.join(readers.READERS)}")
    KEPT.mkdir(parents=True, exist_ok=True)
    print(COLUMNS("reader", "inputs run", "inputs/s", "read as valid", "crashes"), flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        one = partial(crashes, runs=args.runs, seed=args.seed)
        return int(any([*pool.map(one, args.readers or readers.READERS)]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--feed"]:
        feed(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    sys.exit(main())
