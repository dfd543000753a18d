"""Journal: the append-only record of a run, one JSON object a line; a torn last line is dropped and said.

Kinds of entry: start (rulebook, knobs, state), step (what was seen), check (the look at the model), decision
(what was concluded and ordered), outcome (what became of it), call (what the user asked for), blind, notice.
Decisions carry no clock, so that replaying the rest gives them again byte for byte.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from grpo_watchdog.errors import JournalError

SCHEMA = 1
FILE = "journal.jsonl"
_FLUSH_SECONDS = 1.0
_log = logging.getLogger("grpo_watchdog")
_fast = json.JSONEncoder(allow_nan=False, separators=(",", ":"), check_circular=False).encode


def encode(entry: Mapping[str, Any]) -> str:
    """Return one line of strict JSON; not-a-number and infinity become the strings nan, inf and -inf."""
    try:
        return _fast(entry)
    except ValueError:
        return _fast(_spelled(entry))


def decoded(value: Any) -> Any:  # noqa: ANN401
    """Return a part of an entry with the strings nan, inf and -inf as floats again."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else value
    if isinstance(value, dict):
        return {k: decoded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decoded(v) for v in value]
    return value


def _spelled(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(v) for v in value]
    return value


class Journal:
    """Appends entries to a file, or only counts them where there is none.

    Steps are flushed at least once a second; everything else at once, so that a decision is on disk before it is
    acted on. A disk that is full ends the journal with a warning, never the run.

    Args:
        folder: the run's folder, or None for no journal.
    """

    def __init__(self, folder: Path | None) -> None:
        """Open for appending; end a torn last line first."""
        self._file: TextIOWrapper | None = None
        self._flushed = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE
            _mend(path)
            self._file = path.open("a", encoding="utf-8")

    def append(self, entry: Mapping[str, Any], *, flush: bool = True) -> None:
        """Append one entry."""
        if self._file is None:
            return
        try:
            self._file.write(encode(entry) + "\n")
            now = time.monotonic()
            if flush or now - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            _log.error("journal ends here: %s", error)
            self._file = None

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                _log.error("journal not closed: %s", error)
            self._file = None


def _mend(path: Path) -> None:
    """Cut a last line that was not written whole: a new entry must not be glued to it."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
            _log.warning("%s: the last line was torn and is dropped", path)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a run, oldest first. A torn last line is dropped and said as a notice entry.

    Raises:
        JournalError: there is no journal, it is of another schema, or a line in the middle is not an entry.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        with path.open("rb") as file:
            yield from _entries(path, file)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; a run folder holds a {FILE}") from error


def _entries(path: Path, file: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    entry: Any = None
    for number, line in enumerate(file, start=1):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "kind" not in entry:
            if next(file, None) is None:
                yield {"kind": "notice", "step": None, "text": f"line {number} was torn and is dropped"}
                break
            raise JournalError(f"{path}:{number}: not a journal entry")
        if number == 1 and entry["kind"] != "start":
            raise JournalError(f"{path}:1: a journal begins with a start entry, not {entry['kind']!r}")
        if entry["kind"] == "start" and entry.get("schema") != SCHEMA:
            raise JournalError(f"{path}:{number}: schema {entry.get('schema')!r}; this version reads {SCHEMA}")
        yield entry
    if entry is None:
        raise JournalError(f"{path}: empty")
