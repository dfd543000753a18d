"""This project's own journal: the steps of each session; a session is a run."""

from __future__ import annotations

import json
from collections.abc import Iterator

from grpo_watchdog.journal import SCHEMA, decoded
from grpo_watchdog.logs.flatten import flat
from grpo_watchdog.logs.json_text import beginning
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "journal"


def recognises(source: Source) -> bool:
    """Return whether it begins with the start of a session."""
    head = beginning(source)[:4096]
    return head.startswith("{") and '"kind":"start"' in head.replace(" ", "") and '"schema"' in head


def rows(source: Source) -> Iterator[Row]:
    """Yield a row a step.

    Raises:
        LogError: a session was written by another version.
    """
    session, broken, first = 0, 0, ""
    for count, line in source.lines():
        entry = _entry(line)
        if entry is None:
            broken += bool(line.strip())
            first = first or f"line {count}"
        elif entry.get("kind") == "start":
            if entry.get("schema") != SCHEMA:
                raise source.error(str(count), f"schema {entry.get('schema')!r}; this version reads {SCHEMA}")
            session += 1
        elif entry.get("kind") == "step" and isinstance(entry.get("values"), dict):
            step = entry.get("step")
            values, _ = flat(decoded(entry["values"]))
            if values:
                name = f"session {session}" if session > 1 else ""
                yield Row(step if isinstance(step, int) else None, values, name, f"line {count}")
    if broken:
        source.say(f"lines that are no entries and are left out: {broken}; the first is {first}")


def _entry(line: str) -> dict[str, object] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
