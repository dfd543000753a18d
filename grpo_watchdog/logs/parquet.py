"""Parquet: one row a row, by row groups; needs pyarrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module

from grpo_watchdog.logs.records import Record, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "parquet"
_MAGIC = b"PAR1"
_BATCH = 4096
_MOST_IN_MEMORY = 1 << 30  # bytes of a file that cannot be jumped about in: compressed, or standard input
_MOST_A_GROUP = 1 << 32  # bytes of one row group once decompressed


def recognises(source: Source) -> bool:
    """Return whether it begins as parquet does."""
    return source.head.startswith(_MAGIC)


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows.

    Raises:
        LogError: pyarrow is not installed, or cannot read it.
    """
    return rows_of(_records(source), source)


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    try:
        pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")  # only this format needs it
    except ImportError:
        raise source.error("", "is parquet, and pyarrow is not installed; pip install pyarrow") from None
    file: str | io.BytesIO = source.path
    if source.compressed or source.path == "-":
        data = source.stream.read(_MOST_IN_MEMORY)
        if source.stream.peek(1):
            raise source.error("", f"is parquet of more than {_MOST_IN_MEMORY} bytes; unpack it to a file first")
        file = io.BytesIO(data)
    count = 0
    try:
        with pq.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                if table.metadata.row_group(group).total_byte_size > _MOST_A_GROUP:
                    raise source.error(f"row group {group}", f"is larger than {_MOST_A_GROUP} bytes")
                for batch in table.iter_batches(_BATCH, row_groups=[group]):
                    for record in batch.to_pylist():
                        count += 1
                        yield f"row {count}", {key: value for key, value in record.items() if value is not None}
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        text = str(error).partition("\n")[0]
        if not count:
            raise source.error("", f"pyarrow cannot read it: {text}") from error
        source.say(f"pyarrow reads {count} rows and no more: {text}")
