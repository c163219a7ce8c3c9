"""The journal: a sweep's finished units on disk, each written once, whole and under a checksum.

The folder of a running sweep has the manifest, written first, which fixes what the run is, and
``parts/``, one file for each finished unit, whose name carries the SHA-256 of its content. A part
that does not agree with its name is set aside and computed again. When the last unit has ended the
parts become the tables of :mod:`patching.store.folder`, and the folder is a result like any other.
One process at a time holds the folder's lock; the system releases it when that process ends, however.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from patching.engine import Outcome
from patching.errors import PatchingWarning, StoreError, shown
from patching.identity import canonical, plain, sha256
from patching.results import SweepResult
from patching.store.files import LOCK, held, remove_drafts, to_disk, write
from patching.store.folder import read_tables, write_tables
from patching.store.manifest import NAME, read_manifest, write_manifest
from patching.units import Part, Size, Unit

PARTS = "parts"
SUFFIX, DAMAGED = ".safetensors", ".damaged"


@dataclass(frozen=True)
class Journal:
    """Where a long sweep is kept, and, if asked for, how large its units are.

    By default a unit takes about half a minute. Smaller units lose less work when a run is stopped,
    larger ones cost less to keep. The size is fixed when the folder is made.
    """

    folder: str | Path
    pairs: int | None = None
    """Pairs in a unit."""
    cells: int | None = None
    """Cells in a unit."""


@dataclass
class OpenJournal:
    """A journal whose folder this process holds."""

    folder: Path
    manifest: dict[str, Any]
    run: str
    """The hash of what the run is, which every part repeats."""
    kept: dict[int, Path] = field(default_factory=dict)
    """The files of finished units, by number."""

    @property
    def size(self) -> Size:
        return Size(**self.manifest["run"]["size"])

    @property
    def finished(self) -> bool:
        return self.manifest["state"] == "finished"

    def result(self) -> SweepResult:
        """The result of a finished run."""
        return read_tables(self.folder, self.manifest)

    def keep(self, unit: Unit, part: Part) -> None:
        """Write what a unit measured; it is on the disk when this returns."""
        content = _packed(self.run, unit, part)
        path = self.folder / PARTS / f"{unit.number:07d}.{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        try:
            write(path, content)
        except OSError as error:
            raise _unwritable(self.folder, len(self.kept), error) from error
        self.kept[unit.number] = path

    def read(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Part]]:
        """The finished ones of these units. Parts that are damaged are set aside, with a warning."""
        for unit in units:
            if unit.number not in self.kept:
                continue
            path = self.kept[unit.number]
            try:
                yield unit, _unpacked(path, self.run, unit)
            except StoreError as error:
                os.replace(path, path.with_name(path.name + DAMAGED))
                del self.kept[unit.number]
                warnings.warn(
                    f"{error} It is set aside as {path.name + DAMAGED} and its unit is run again.",
                    PatchingWarning,
                    stacklevel=2,
                )

    def finish(self, result: SweepResult) -> None:
        """Turn the parts into the tables of a result."""
        try:
            files = write_tables(self.folder, result)
            self.manifest |= {"state": "finished", "provenance": plain(result.provenance), "files": files}
            write_manifest(self.folder, _stated(self.manifest))
        except (OSError, UnicodeEncodeError) as error:
            raise _unwritable(self.folder, len(self.kept), error) from error
        _remove_parts(self.folder)


@contextmanager
def journal(
    asked: Journal, identity: Mapping[str, Any], described: Mapping[str, Any], size: Size,
    environment: Mapping[str, Any],
) -> Iterator[OpenJournal]:  # fmt: skip
    """The journal of a run: a new one, or the one it left when it stopped.

    ``identity`` is what must be the same; ``environment`` is noted where it changes. Raises
    :class:`StoreError` where the folder holds another run or anything else, or is in use.
    """
    folder = Path(asked.folder)
    _check_foreign(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except OSError as error:
            raise _unwritable(folder, 0, error) from error
        _check_foreign(folder)
        yield _opened(folder, asked, dict(identity), dict(described), size, dict(environment))


def _opened(
    folder: Path, asked: Journal, identity: dict[str, Any], described: dict[str, Any], size: Size,
    environment: dict[str, Any],
) -> OpenJournal:  # fmt: skip
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        _check_same(folder, manifest, identity, asked)
    else:
        run = {"identity": identity, "size": vars(size), "sessions": []}
        manifest = {"state": "running", "run": run, "result": described, "provenance": {}, "files": {}}
    opened = OpenJournal(folder, manifest, _run_hash(manifest["run"]))
    if opened.finished:
        _remove_parts(folder)
        return opened
    _note_session(folder, manifest, environment)
    opened.kept.update(_kept(folder / PARTS))
    return opened


def _check_foreign(folder: Path) -> None:
    """Raise for a folder that holds something other than a run."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; a run is kept in a folder. Give another name.")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in there if name != LOCK and not name.startswith(f".{NAME}.")]
    if strange and NAME not in there:
        raise StoreError(
            f"{folder} holds something else already ({', '.join(strange[:3])}): nothing is written into "
            "it. Give a folder that does not exist yet."
        )


def _check_same(folder: Path, manifest: dict[str, Any], identity: dict[str, Any], asked: Journal) -> None:
    """Raise where a folder's run is not the one that is asked for, naming every difference."""
    run = manifest["run"]
    if not _is_run(run):
        raise StoreError(
            f"{folder} holds a saved result, not a run: there is nothing to go on with. Read it with "
            "SweepResult.load, or give another folder."
        )
    stored, wanted = dict(_flat(run["identity"])), dict(_flat(plain(identity)))
    for axis in ("pairs", "cells"):
        if getattr(asked, axis) is not None:
            stored[f"{axis} in a unit"], wanted[f"{axis} in a unit"] = run["size"][axis], getattr(asked, axis)
    different = [
        f"  {key}: {shown(stored.get(key, 'nothing'))} there, {shown(wanted.get(key, 'nothing'))} asked for"
        for key in sorted(stored | wanted)
        if canonical(stored.get(key)) != canonical(wanted.get(key))
    ]
    if different:
        raise StoreError(
            f"{folder} holds another run, and nothing of it is changed. Give another folder, or the "
            "arguments of that run. They differ in:\n" + "\n".join(different)
        )


def _is_run(run: Any) -> bool:
    """Whether a manifest's ``run`` is what :func:`_opened` puts there."""
    return (
        isinstance(run, dict)
        and set(run) == {"identity", "size", "sessions"}
        and isinstance(run["identity"], dict)
        and isinstance(run["size"], dict)
        and set(run["size"]) == {"pairs", "cells"}
        and all(isinstance(count, int) and count > 0 for count in run["size"].values())
        and isinstance(run["sessions"], list)
        and all(isinstance(s, dict) and isinstance(s.get("environment"), dict) for s in run["sessions"])
    )


def _flat(entries: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _note_session(folder: Path, manifest: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write the manifest with one more start in it; warn where the machine or a version is another."""
    sessions = manifest["run"]["sessions"]
    before = dict(_flat(sessions[-1]["environment"])) if sessions else {}
    changed = [
        f"{key}: {shown(before[key])} before, {shown(value)} now"
        for key, value in _flat(environment)
        if key in before and before[key] != value
    ]
    if changed:
        warnings.warn(
            f"{folder} goes on where something else was before ({'; '.join(changed)}): values may differ "
            "by rounding from those of an undisturbed run. The provenance says so.",
            PatchingWarning,
            stacklevel=2,
        )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sessions.append({"started": now, "environment": environment})
    try:
        remove_drafts(folder)
        remove_drafts(folder / PARTS)
        write_manifest(folder, _stated(manifest))  # first of all: without it a folder is taken for another's
        (folder / PARTS).mkdir(exist_ok=True)
    except (OSError, UnicodeEncodeError) as error:
        raise _unwritable(folder, 0, error) from error


def _stated(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("state", "run", "result", "provenance", "files")}


def _run_hash(run: Mapping[str, Any]) -> str:
    return sha256(canonical(run["identity"]), canonical(run["size"]))


def _kept(parts: Path) -> Iterator[tuple[int, Path]]:
    for entry in os.scandir(parts):
        number, _, rest = entry.name.partition(".")
        if entry.name.endswith(SUFFIX) and number.isdigit() and rest:
            yield int(number), Path(entry.path)


def _packed(run: str, unit: Unit, part: Part) -> bytes:
    """A part as a safetensors file: three arrays, and what the unit is and how it was run, as JSON."""
    facts = {"run": run, "unit": unit.number, "facts": plain(part.facts)}
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    outcome = part.outcome
    arrays = {"clean": outcome.clean, "corrupted": outcome.corrupted, "cells": outcome.cells}
    return save_tensors({**{k: np.ascontiguousarray(v) for k, v in arrays.items()}, "facts": text})


def _unpacked(path: Path, run: str, unit: Unit) -> Part:
    """A part from its file; :class:`StoreError` for one that is not what was written."""
    n_pairs, n_cells = len(unit.rows), len(unit.cells)
    shapes = {"clean": (n_pairs,), "corrupted": (n_pairs,), "cells": (n_cells, n_pairs)}
    try:
        content = path.read_bytes()
        if path.name.split(".")[1] != hashlib.sha256(content).hexdigest():
            raise ValueError("its content does not agree with the checksum in its name")
        arrays = load_tensors(content)
        facts = json.loads(arrays["facts"].tobytes())
        if facts["run"] != run or facts["unit"] != unit.number:
            raise ValueError("it belongs to another run")
        for name, shape in shapes.items():
            if arrays[name].shape != shape or arrays[name].dtype != np.float64:
                raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {shape}")
        return Part(Outcome(*(arrays[name] for name in shapes)), dict(facts["facts"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise StoreError(f"{path}: a part that does not read: {error}.") from error


def _remove_parts(folder: Path) -> None:
    """Drop the parts of a finished run; its tables have what they held."""
    if (folder / PARTS).is_dir():
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        to_disk(folder)


def _unwritable(folder: Path, kept: int, error: OSError | UnicodeEncodeError) -> StoreError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"the folder cannot be written: {error}"
    return StoreError(
        f"{folder}: {what}. The {kept} units that were finished are safe. "
        f"{'Make room' if full else 'Mend that'}, and run the same sweep again: it goes on from there."
    )
