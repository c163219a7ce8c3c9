"""Parquet files in memory. What a file claims of itself is checked before memory is taken for it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

VALUES_PER_BYTE = 1000
"""Values of a column for each byte of a file: more than tables of prompts or results are compressed by."""


def parquet_table(content: bytes) -> "pa.Table":
    """The table of a Parquet file, text and lengths in it checked.

    Raises what Arrow raises where the bytes do not read, and ``ValueError`` where they claim more rows
    than they can hold, for which Arrow would take memory until there is none.
    """
    from pyarrow import BufferReader
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(BufferReader(content))
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    values = [group.column(i).num_values for group in groups for i in range(group.num_columns)]
    most = VALUES_PER_BYTE * len(content)
    if sum(counts) != file.metadata.num_rows or not all(0 <= n <= most for n in [*counts, *values]):
        raise ValueError(
            f"it claims {file.metadata.num_rows:,} rows, up to {max(counts, default=0):,} in a group and "
            f"{max(values, default=0):,} values in a column, which its {len(content):,} bytes do not hold"
        )
    table = file.read()
    table.validate(full=True)  # text that is not UTF-8, lengths that lie
    return table
