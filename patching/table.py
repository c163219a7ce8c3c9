"""Tables of prompt pairs: files and frames in, rows out; and pairs out as a file.

A row is a mapping from column name to value, with the place where a person finds it. Files are read
as data only. What the rows mean is in ``rows``.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from patching.errors import PairError
from patching.parquet import parquet_table
from patching.prompt import PromptPair

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with their places: ``("line 3", {"clean": ...})``."""

    name: str | None
    """The name for a dataset made from it, if it has one."""
    source: str
    """What an error calls it."""
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, Row]]
    problems: Sequence[str] = ()
    """Rows that could not be read, with their places."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Where it came from, for provenance."""
    cells_are_text: bool = False
    """Whether lists and mappings are written as JSON, since cells hold nothing but text."""


def of_frame(frame: pd.DataFrame) -> Table:
    """The rows of a DataFrame, placed by their index."""
    if not isinstance(frame, pd.DataFrame):
        raise PairError(f"from_frame reads a pandas DataFrame, got {type(frame).__name__}.")
    columns = [str(column) for column in frame.columns]
    _check_names(columns, "the DataFrame")
    values = zip(*(frame.iloc[:, i].tolist() for i in range(len(columns))), strict=True)
    rows = [
        (f"index {label!r}", dict(zip(columns, row, strict=True)))
        for label, row in zip(frame.index.tolist(), values, strict=True)
    ]
    return Table(None, "the DataFrame", tuple(columns), rows)


def of_csv(path: str | Path) -> Table:
    """The rows of a CSV file, placed by the line they begin in."""
    path, stored = _stored(path)
    text = _decoded(path, stored)
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    lines = _csv_lines(path, reader)
    header = next(lines, None)
    if header is None:
        raise PairError(f"{path.name} is empty; expected a line of column names and a line for each pair.")
    _, columns = header
    _check_names(columns, path.name)
    rows, problems = [], []
    for line, cells in lines:
        if len(cells) != len(columns):
            problems.append(
                f"line {line}: {len(cells)} cells, expected {len(columns)} ({', '.join(columns)}). "
                "A cell with a comma in it stands in double quotes."
            )
        else:
            rows.append((f"line {line}", dict(zip(columns, cells, strict=True))))
    return Table(path.stem, path.name, tuple(columns), rows, problems, _facts(path, stored), True)


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Each record with the number of its first line; blank lines are none."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise PairError(f"{path.name}, line {line}: not CSV: {error}.") from error
        if cells:
            yield line, cells


def of_jsonl(path: str | Path) -> Table:
    """The objects of a JSONL file, placed by their line."""
    path, stored = _stored(path)
    rows, problems = [], []
    columns: dict[str, None] = {}
    for number, line in enumerate(StringIO(_decoded(path, stored)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=json_object, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not JSON: {error}.")
            continue
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
            rows.append((f"line {number}", row))
        else:
            problems.append(f"line {number}: {_kind(row)}, expected an object {{...}} with a key per column.")
    return Table(path.stem, path.name, tuple(columns), rows, problems, _facts(path, stored))


def of_parquet(path: str | Path) -> Table:
    """The rows of a Parquet file, counted from 1."""
    path, stored = _stored(path)
    try:
        read = parquet_table(stored)
        columns, values = list(read.column_names), read.to_pylist()
    except (ValueError, ArithmeticError) as error:  # also dates that Python has not
        raise PairError(f"{path.name}: not a Parquet file that can be read: {error}") from error
    _check_names(columns, path.name)
    rows = [(f"row {number}", _without_gaps(row)) for number, row in enumerate(values, start=1)]
    return Table(path.stem, path.name, tuple(columns), rows, facts=_facts(path, stored))


def of_hf(dataset: Any) -> Table:
    """The rows of a Hugging Face dataset, placed by their number in it."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        splits = (
            f" with the splits {', '.join(dataset)}; give one of them" if isinstance(dataset, dict) else ""
        )
        raise PairError(f"from_hf reads a datasets.Dataset, got {type(dataset).__name__}{splits}.")
    rows = [(f"dataset[{i}]", _without_gaps(row)) for i, row in enumerate(dataset.with_format(None))]
    facts = {"source": str(dataset.info.dataset_name or "datasets.Dataset"), "split": str(dataset.split)}
    return Table(None, "the dataset", tuple(dataset.column_names), rows, facts=facts)


def _without_gaps(row: Row) -> Row:
    """A row whose structs have no empty fields: Arrow gives every struct the fields of all of them."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value

    return {column: filled(value) for column, value in row.items()}


def write_jsonl(path: str | Path, pairs: Iterable[PromptPair]) -> str:
    """Write pairs as JSON, one a line, and return the SHA-256 of the file."""
    lines = [json.dumps(_record(pair), ensure_ascii=False) + "\n" for pair in pairs]
    stored = "".join(lines).encode("utf-8")
    Path(path).write_bytes(stored)
    return hashlib.sha256(stored).hexdigest()


def _record(pair: PromptPair) -> dict[str, Any]:
    """A pair as JSON has it; roles and template only where there are any."""
    record: dict[str, Any] = {
        "clean": _plain(pair.clean),
        "corrupted": _plain(pair.corrupted),
        "correct": _plain(pair.correct),
        "incorrect": _plain(pair.incorrect),
    }
    if pair.roles:
        record["roles"] = {role: _plain(at) for role, at in pair.roles.items()}
    if pair.template:
        record["template"] = pair.template
    return record


def _plain(value: Any) -> Any:
    """Text, whole numbers and lists of them."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) else int(value)


def _stored(path: str | Path) -> tuple[Path, bytes]:
    path = Path(path)
    if not path.is_file():
        raise PairError(f"no file at {path}.")
    return path, path.read_bytes()


def _decoded(path: Path, stored: bytes) -> str:
    try:
        return stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = stored.count(b"\n", 0, error.start) + 1
        raise PairError(f"{path.name}, line {line}: not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _facts(path: Path, stored: bytes) -> dict[str, str]:
    return {"source": path.name, "sha256": hashlib.sha256(stored).hexdigest()}


def _check_names(columns: Sequence[str], source: str) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise PairError(f"{source} has several columns called {', '.join(map(repr, twice))}; rename them.")


def json_object(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from pairs of key and value; ``json`` itself would drop all but the last of equal keys."""
    keys = [key for key, _ in items]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(items)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
