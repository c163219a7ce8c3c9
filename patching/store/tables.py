"""Tables: values, cells and pairs of a result as Parquet, and back to the last bit.

``values``: one row for each cell and pair, the cells in the order of the axes. ``cells``: one row for
each site; a cell that does not exist has none. ``pairs``: one row for each pair.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patching.errors import StoreError
from patching.parquet import parquet_table
from patching.results import PairInfo
from patching.sites import Cell, Site

VALUES = pa.schema([("cell", pa.int64()), ("pair", pa.int64()), ("patched", pa.float64())])
CELLS = pa.schema(
    [
        ("cell", pa.int64()), ("hook_point", pa.string()),
        ("pos", pa.int64()), ("pos_role", pa.string()), ("head", pa.int64()), ("neuron", pa.int64()),
        ("dest_pos", pa.int64()), ("dest_role", pa.string()), ("src_pos", pa.int64()),
    ]
)  # fmt: skip
PAIRS = pa.schema(
    [
        ("pair", pa.int64()), ("clean", pa.float64()), ("corrupted", pa.float64()),
        ("clean_tokens", pa.list_(pa.string())), ("corrupted_tokens", pa.list_(pa.string())),
        ("roles", pa.list_(pa.struct([("role", pa.string()), ("positions", pa.list_(pa.int64()))]))),
        ("template", pa.string()),
    ]
)  # fmt: skip
MAY_BE_EMPTY = frozenset(CELLS.names) - {"cell", "hook_point"}


class Pairs(NamedTuple):
    """What the table of pairs holds."""

    info: tuple[PairInfo, ...]
    clean: np.ndarray  # [pair]
    corrupted: np.ndarray  # [pair]


def write_values(patched: np.ndarray) -> bytes:
    """``[cell, pair]`` as one row each."""
    n_cells, n_pairs = patched.shape
    cell, pair = np.repeat(np.arange(n_cells), n_pairs), np.tile(np.arange(n_pairs), n_cells)
    return _bytes(pa.table([cell, pair, patched.ravel()], schema=VALUES))


def read_values(content: bytes, name: str, n_cells: int, n_pairs: int) -> np.ndarray:
    """Values ``[cell, pair]``."""
    table = _table(content, name, VALUES)
    cell, pair, patched = (table[column].to_numpy() for column in VALUES.names)
    in_order = len(table) == n_cells * n_pairs and bool(
        (cell * n_pairs + pair == np.arange(len(table))).all() and ((pair >= 0) & (pair < n_pairs)).all()
    )
    if not in_order:
        raise StoreError(
            f"{name}: expected a row for each of {n_cells} cells × {n_pairs} pairs, in that order; "
            f"found {len(table)} rows that are not these. The file is not the one that was written."
        )
    return patched.reshape(n_cells, n_pairs).copy()


def write_cells(cells: Sequence[Cell]) -> bytes:
    """The sites of every cell."""
    rows = [{"cell": number, **site_row(site)} for number, cell in enumerate(cells) for site in cell]
    return _bytes(pa.Table.from_pylist(rows, schema=CELLS))


def read_cells(content: bytes, name: str, n_cells: int) -> tuple[Cell, ...]:
    """The cells, those without a row empty."""
    cells: list[list[Site]] = [[] for _ in range(n_cells)]
    for row in _table(content, name, CELLS).to_pylist():
        number = row.pop("cell")
        if not 0 <= number < n_cells:
            raise StoreError(f"{name}: there is no cell {number} among {n_cells}.")
        cells[number].append(site_of(row, name))
    return tuple(tuple(cell) for cell in cells)


def site_row(site: Site) -> dict[str, Any]:
    """A site as plain values; positions that are names of roles stand apart from numbers."""
    row = {axis: getattr(site, axis) for axis in ("hook_point", "head", "neuron", "src_pos")}
    for axis, role in (("pos", "pos_role"), ("dest_pos", "dest_role")):
        at = getattr(site, axis)
        row |= {role: at} if isinstance(at, str) else {axis: at}
    return row


def site_of(row: dict[str, Any], name: str) -> Site:
    """The site that plain values describe."""
    row = dict(row)
    for axis, role in (("pos", "pos_role"), ("dest_pos", "dest_role")):
        at = row.pop(role, None)
        if at is not None and row.get(axis) is not None:
            raise StoreError(f"{name}: a site has both the {axis} {row[axis]} and the role {at!r}.")
        row[axis] = row.get(axis) if at is None else at
    return Site(**row)


def write_pairs(pairs: Sequence[PairInfo], clean: np.ndarray, corrupted: np.ndarray) -> bytes:
    """The pairs with their unpatched scores."""
    rows = [
        {
            "pair": pair.index,
            "clean": float(clean[p]),
            "corrupted": float(corrupted[p]),
            "clean_tokens": list(pair.clean_tokens),
            "corrupted_tokens": list(pair.corrupted_tokens),
            "roles": [{"role": role, "positions": list(at)} for role, at in pair.roles.items()],
            "template": pair.template,
        }
        for p, pair in enumerate(pairs)
    ]
    return _bytes(pa.Table.from_pylist(rows, schema=PAIRS))


def read_pairs(content: bytes, name: str) -> Pairs:
    """The pairs with their unpatched scores."""
    table = _table(content, name, PAIRS)
    try:
        info = tuple(
            PairInfo(
                row["pair"],
                _words(row["clean_tokens"]),
                _words(row["corrupted_tokens"]),
                {_word(role["role"]): _places(role["positions"]) for role in row["roles"]},
                row["template"],
            )
            for row in table.to_pylist()
        )
    except (TypeError, KeyError) as error:
        raise StoreError(f"{name}: a pair has an empty token or role.") from error
    return Pairs(info, *(table[side].to_numpy().copy() for side in ("clean", "corrupted")))


def _word(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(text)
    return text


def _words(texts: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(_word, texts))


def _places(numbers: Sequence[Any]) -> tuple[int, ...]:
    return tuple(number + 0 for number in numbers)


def _bytes(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _table(content: bytes, name: str, schema: pa.Schema) -> pa.Table:
    """A table of exactly these columns, without empty fields where there must be none."""
    try:
        table = parquet_table(content)
    except ValueError as error:
        raise StoreError(f"{name}: not a Parquet file that can be read: {_line(error)}") from error
    if not table.schema.equals(schema):
        found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        expected = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise StoreError(f"{name}: has the columns {found}; expected {expected}.")
    empty = [column for column in schema.names if table[column].null_count and column not in MAY_BE_EMPTY]
    if empty:
        raise StoreError(f"{name}: empty fields in the column {', '.join(empty)}.")
    return table


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
