"""JSON of rows: a list of objects, columns, or either of them somewhere in an object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from grpo_watchdog.logs.json_text import beginning, documents, parsed_int
from grpo_watchdog.logs.records import rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import HEAD, Source
from grpo_watchdog.logs.tables import MOST_ROWS, Table, tables
from grpo_watchdog.logs.trainer_state import measured

NAME = "json"
_LIST = re.compile(r"\[\s*(?:\{\s*(?:[\"}]|$)|\[\s*-?\d[\d.eE+-]*\s*,|\]\s*$|$)")  # a console log may begin with [ too
_TRANSFORMERS = ("loss", "grad_norm", "learning_rate", "epoch")  # a log_history saved alone
_DECODER = json.JSONDecoder(parse_int=parsed_int)


def recognises(source: Source) -> bool:
    """Return whether it is JSON that does not hold one object a line."""
    head = beginning(source)
    if head.startswith("["):
        return _LIST.match(head) is not None
    if not head.startswith("{") or head[1:].lstrip()[:1] not in ('"', "}"):
        return False
    try:
        value, end = _DECODER.raw_decode(head)
    except (ValueError, RecursionError):
        line = head.partition("\n")[0]
        return len(source.head) >= HEAD or line.strip() == "{" or "\n" not in head.strip()
    if head[end:].lstrip():
        return "\n" in head[:end].strip()  # several documents behind each other, each over several lines
    return bool(tables(value, "value")) or "\n" in head[:end]


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of the longest table in it.

    Raises:
        LogError: it is not JSON.
    """
    name = PurePath(source.path).name.removesuffix(".gz").removesuffix(".json")
    loose: list[object] = []
    for document in documents(source):
        found = tables(document, name)
        if not found and isinstance(document, dict):
            loose.append(document)  # one row: there are more of them behind it
        for table in found:
            yield from _rows(table, source)
    yield from _rows(Table((), [record for record in loose if isinstance(record, dict)]), source)


def _rows(table: Table, source: Source) -> Iterator[Row]:
    records = table.records
    if len(records) >= MOST_ROWS:
        source.say(
            f"more than {MOST_ROWS} rows in one JSON document: the rest is left out; write one row a line (JSONL)"
        )
        records = records[:MOST_ROWS]
    if records and all(key in records[0] for key in _TRANSFORMERS):
        return rows_of(measured(records, source), source, table.run)
    return rows_of(((f"row {count}", record) for count, record in enumerate(records, 1)), source, table.run)
