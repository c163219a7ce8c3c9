"""Parquet files in memory. What a file claims of itself is checked before memory is taken for it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BYTE = 1000
"""Rows for each byte of a file: more than tables of prompts or results are compressed by."""
BATCH = 2**16
"""Rows that memory is taken for at once, whatever a column claims to hold."""


def parquet_table(content: bytes) -> "pa.Table":
    """The table of a Parquet file, text and lengths in it checked.

    Raises ``ValueError`` where the bytes do not read, or hold other numbers of rows than they claim:
    Arrow takes memory for all claimed rows of a column at once, unless it is read batch by batch. (And
    what a column claims cannot be asked before: Arrow ends the process where its statistics are wrong.)
    """
    from pyarrow import ArrowException, BufferReader, Table
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(BufferReader(content))
        facts = file.metadata
        claimed = [facts.num_rows, *(facts.row_group(i).num_rows for i in range(facts.num_row_groups))]
        if not all(0 <= rows <= ROWS_PER_BYTE * len(content) for rows in claimed):
            raise ValueError(f"it claims {max(claimed):,} rows, which its {len(content):,} bytes do not hold")
        table = Table.from_batches(file.iter_batches(BATCH), file.schema_arrow)
        table.validate(full=True)  # text that is not UTF-8, lengths that lie
    except (ArrowException, OSError, TypeError, MemoryError) as error:
        raise ValueError(str(error)) from error
    if not table.num_rows == facts.num_rows == sum(claimed[1:]):
        raise ValueError(f"it claims {facts.num_rows:,} rows and holds {table.num_rows:,}")
    return table
