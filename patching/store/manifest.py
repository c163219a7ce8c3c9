"""The manifest: what a folder of results is, in one JSON file that names and checks all others."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patching.errors import StoreError
from patching.identity import canonical, sha256
from patching.store.files import inside, write

NAME = "manifest.json"
FORMAT = "patching.sweep"
VERSION = 1
"""Raised with every change that an older version would read wrongly."""
KEYS = {"format", "version", "state", "run", "result", "provenance", "files", "checksum"}
STATES = ("finished", "running")
DEEPEST = 100
"""Levels of objects and lists in a manifest. More are refused before Python's own limit is near."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with the checksum of what it says."""
    entries = {"format": FORMAT, "version": VERSION, **_strict(manifest)}
    entries["checksum"] = sha256(canonical(entries))
    write(folder / NAME, json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; :class:`StoreError` where it is not one, or not what was written."""
    path = folder / NAME
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}.")
    if not path.is_file() or path.is_symlink():
        raise StoreError(
            f"{folder} holds no result: there is no file {NAME} in it. A folder that was cut off while "
            "it was written never takes its final name, so this is another one."
        )
    entries = _json(path)
    if entries.get("format") != FORMAT:
        raise StoreError(f"{path}: not a result of this package: its format is {entries.get('format')!r}.")
    version = entries.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{path}: written in format {version} by a newer version of patching; this one reads formats "
            f"up to {VERSION}. Upgrade with: pip install --upgrade patching"
        )
    try:
        _check_sum(path, entries)
        entries = _loose(entries)
    except RecursionError as error:
        raise StoreError(f"{path}: not a manifest: what it says is nested too deep.") from error
    _check_kinds(path, entries)
    return entries


def _json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError, OSError) as error:
        raise StoreError(
            f"{path}: does not read ({str(error)[:200]}): cut short or changed. "
            "Restore the folder from a copy, or run the sweep again."
        ) from error
    if not isinstance(entries, dict):
        raise StoreError(f"{path}: not a manifest: {type(entries).__name__} where an object is expected.")
    return entries


def _check_sum(path: Path, entries: dict[str, Any]) -> None:
    """Raise where the keys or the checksum are not those of a manifest; take the checksum out."""
    found = set(entries)
    if found != KEYS:
        odd = [f"unknown key {key!r}" for key in sorted(found - KEYS)]
        odd += [f"no {key!r}" for key in sorted(KEYS - found)]
        raise StoreError(f"{path}: not a manifest: {', '.join(odd)}.")
    if entries.pop("checksum") != sha256(canonical(entries)):
        raise StoreError(
            f"{path}: its content does not agree with its checksum: it was changed after it was written. "
            "Restore the folder from a copy, or run the sweep again."
        )


def _check_kinds(path: Path, entries: dict[str, Any]) -> None:
    """Raise where what stands under the keys is not what stands there in a manifest."""
    kinds: dict[str, Any] = {"run": (dict, type(None)), "result": dict, "provenance": dict, "files": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(entries[key], kind)]
    version = entries["version"]
    if wrong or version != VERSION or isinstance(version, bool) or entries["state"] not in STATES:
        raise StoreError(f"{path}: not a manifest: unexpected content under {', '.join(wrong) or 'state'}.")


def read_files(folder: Path, files: Mapping[str, Any], names: Sequence[str]) -> list[bytes]:
    """The content of a folder's files, each held to the manifest's checksum."""
    for name in files:
        inside(folder, name)
    missing = [name for name in names if name not in files]
    if missing:
        raise StoreError(f"{folder / NAME}: names no file {', '.join(missing)}.")
    return [_file(inside(folder, name), files[name]) for name in names]


def _file(path: Path, stated: Any) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: the manifest names this file, but it does not read: {error}.") from error
    if not isinstance(stated, str) or hashlib.sha256(content).hexdigest() != stated:
        raise StoreError(
            f"{path}: its content does not agree with the manifest's SHA-256: it was changed, cut short or "
            "damaged. Restore the folder from a copy, or run the sweep again."
        )
    return content


def _strict(value: Any, levels: int = DEEPEST) -> Any:
    """Plain values as standard JSON, which has no word for NaN and the infinities."""
    if not levels:
        raise StoreError(f"a manifest does not hold values that are nested {DEEPEST} levels deep.")
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, Mapping):
        return {key: _strict(item, levels - 1) for key, item in value.items()}
    return [_strict(item, levels - 1) for item in value] if isinstance(value, list | tuple) else value


def _loose(value: Any, levels: int = DEEPEST) -> Any:
    """The plain values that :func:`_strict` wrote."""
    if not levels:
        raise RecursionError
    if isinstance(value, dict):
        special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
        if set(value) == {"$float"} and isinstance(value["$float"], str) and value["$float"] in special:
            return special[value["$float"]]
        return {key: _loose(item, levels - 1) for key, item in value.items()}
    return [_loose(item, levels - 1) for item in value] if isinstance(value, list) else value
