"""JSONL: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from grpo_watchdog.logs.json_text import beginning, parsed_int
from grpo_watchdog.logs.records import Record, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import HEAD, Source

NAME = "jsonl"
_LOOKED_AT = 20  # lines


def recognises(source: Source) -> bool:
    """Return whether most of the first lines are JSON objects."""
    head = beginning(source)
    if not head.startswith("{"):
        return False
    lines = [line for line in head.splitlines() if line.strip()]
    if len(source.head) >= HEAD and len(lines) > 1:
        lines.pop()  # cut
    lines = lines[:_LOOKED_AT]
    return sum(_object(line) is not None for line in lines) * 2 >= len(lines)


def rows(source: Source) -> Iterator[Row]:
    """Yield a row for each line; lines that are no objects are passed over, and counted."""
    return rows_of(_records(source), source)


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    broken, first = 0, ""
    for count, line in source.lines():
        if not line or line.isspace():
            continue
        record = _object(line)
        if record is None:
            broken += 1
            first = first or f"line {count}"
        else:
            yield f"line {count}", record
    if broken:
        source.say(f"lines that are no JSON objects and are left out: {broken}; the first is {first}")


def _object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line, parse_int=parsed_int)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
