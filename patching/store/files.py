"""Files and folders that are there whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patching.errors import StoreError


def write(path: Path, content: bytes) -> str:
    """Write a file under its name only once it is whole and on the disk; its SHA-256."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    to_disk(path.parent)
    return hashlib.sha256(content).hexdigest()


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
    mask = os.umask(0)
    os.umask(mask)
    return mask
