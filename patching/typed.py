"""Files of keys and values, in TOML or JSON: keys and types checked, all problems reported at once."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from patching.errors import PatchingError, shown, unknown

Kind = Any
"""What a key may hold, as ``isinstance`` takes it: a type, a union or a tuple of types."""


def read_toml(path: str | Path, error: type[PatchingError]) -> dict[str, Any]:
    """What a TOML file says; ``error`` where there is no such file or it is not TOML."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"no file {path}.") from None
    except (ValueError, RecursionError) as reason:  # also numbers without end, and endless nesting
        raise error(f"{path.name}: not a TOML file: {reason}.") from reason
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}.") from reason


def stop(path: str | Path, kind: str, problems: list[str], error: type[PatchingError]) -> None:
    """Raise one error with every problem found in a file, if there are any."""
    if problems:
        raise error(f"{Path(path).name}: " + "\n  ".join([f"the {kind} does not read:", *problems]))


def typed(
    table: object,
    required: Mapping[str, Kind],
    where: str,
    problems: list[str],
    optional: Mapping[str, Kind] | None = None,
) -> bool:
    """Whether a table has exactly the keys it may have, each of the right type."""
    before = len(problems)
    if not isinstance(table, dict):
        problems.append(f"{where}: expected a table, got {shown(table)}.")
        return False
    allowed = {**required, **(optional or {})}
    for key in sorted(table.keys() - allowed.keys()):
        problems.append(f"{where}: {unknown('key', key, allowed)}")
    for key in sorted(required.keys() - table.keys()):
        problems.append(f"{where}: the key {key!r} is missing.")
    for key in sorted(table.keys() & allowed.keys()):
        if not _is(table[key], allowed[key]):
            problems.append(f"{where}: {key} should be {_type_name(allowed[key])}, got {_said(table[key])}.")
    return len(problems) == before


def texts(values: object, where: str, problems: list[str]) -> None:
    """Note a problem unless the values are a list of texts."""
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        problems.append(f"{where}: expected a list of texts, got {shown(values)}.")


def _kinds(kind: Kind) -> tuple[type, ...]:
    if isinstance(kind, UnionType):
        return kind.__args__
    return kind if isinstance(kind, tuple) else (kind,)


def _is(value: object, kind: Kind) -> bool:
    """``isinstance``, but true and false are no numbers, nor are those that 64 bits do not hold."""
    kinds = _kinds(kind)
    return bool in kinds if isinstance(value, bool) else isinstance(value, kinds) and not _is_long(value)


def _is_long(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 63


def _said(value: object) -> str:
    return f"{shown(value)}{', which 64 bits do not hold' * _is_long(value)}"


def _type_name(kind: Kind) -> str:
    names = {str: "a text", list: "a list", dict: "a table", bool: "true or false", int: "a whole number"}
    kinds = [k for k in _kinds(kind) if not (k is int and float in _kinds(kind))]
    return " or ".join(names.get(k, "a number") for k in kinds)
