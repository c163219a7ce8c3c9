"""Files and folders that are there whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from patching.errors import StoreError

LOCK = ".lock"
WAIT = 2.0
"""Seconds to wait for the lock: the workers of a driver that was killed hold it until they notice."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder, made if need be, that this process alone writes, until it ends or is killed.

    Raises :class:`StoreError` where another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=WAIT)
    except Timeout as error:
        raise StoreError(
            f"{folder} is in use: another process is writing it. Wait for it, or give another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to fill, which takes its place under ``path``, or that of another, when it is complete."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o666 & ~_umask())
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def write(path: Path, content: bytes) -> str:
    """Write a file under its name only once it is whole and on the disk; its SHA-256."""
    with new_file(path) as draft:
        draft.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process was writing into a folder that is held."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def to_disk(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place under ``folder`` when it is complete.

    Raises :class:`StoreError` where something is there already; nothing is ever overwritten.
    """
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        check_free(folder)
        os.rename(draft, folder)  # also onto an empty folder; never onto a full one
        to_disk(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise where a folder cannot be made, since something is there already."""
    if folder.is_dir() and any(folder.iterdir()):
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:3])
        raise StoreError(
            f"the folder {folder} is not empty (it holds {some}, ...): nothing is overwritten. Give "
            "the name of a folder that does not exist yet, or remove this one first."
        )
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; a result is saved as a folder. Give another name.")


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder; :class:`StoreError` for a name that leads out of it."""
    path = folder / name
    try:
        leads_out = (
            not name or "\0" in name or Path(name).name != name or name in (".", "..") or path.is_symlink()
        )
    except OSError:  # longer than a name can be
        leads_out = True
    if leads_out:
        raise StoreError(
            f"{folder}: the manifest names the file {name!r}, which is not a plain file of this folder. "
            "Files outside are never read."
        )
    return path


def _umask() -> int:
    mask = os.umask(0o077)  # it cannot be read alone; meanwhile other threads make files for nobody else
    os.umask(mask)
    return mask
