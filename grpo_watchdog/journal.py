"""Journal: the append-only record of a run, one JSON object a line; a torn last line is dropped and said.

Kinds of entry: start (rulebook, knobs, state), step (what was seen), check (the look at the model), decision
(what was concluded and ordered), outcome (what became of it), held (a knob that did not stay), resumed (what a new
session put back), call (what the loop asked for), blind, notice, state (what the plan remembers), end.
Decisions carry no clock, so that replaying the rest gives them again byte for byte.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import to_json

from grpo_watchdog.errors import JournalError, RulebookError

SCHEMA = 1
FILE = "journal.jsonl"
_FLUSH_SECONDS = 1.0
_CHUNK = 1 << 20
_BUFFER = 1 << 16  # bytes between two writes of quiet steps
_log = logging.getLogger("grpo_watchdog")
_NONFINITE = ("NaN", "Infinity", "-Infinity")


def encode(entry: Mapping[str, Any]) -> bytes:
    """Return one line of strict JSON, floats exact; not-a-number and infinity become strings."""
    return to_json(entry, inf_nan_mode="strings")


def decoded(value: Any) -> Any:  # noqa: ANN401
    """Return a part of an entry with the strings NaN, Infinity and -Infinity as floats again."""
    if isinstance(value, str):
        return float(value) if value in _NONFINITE else value
    if isinstance(value, dict):
        return {k: decoded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decoded(v) for v in value]
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
        self._file: BinaryIO | None = None
        self._flushed = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE
            _mend(path)
            file = path.open("ab", buffering=_BUFFER)
            self._file = file
            weakref.finalize(self, _close, file)  # a loop that never closes the watchdog loses nothing

    def append(self, entry: Mapping[str, Any], *, flush: bool = True) -> None:
        """Append one entry."""
        if self._file is None:
            return
        try:
            self._file.write(encode(entry) + b"\n")
            now = time.monotonic()
            if flush or now - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            _log.error("journal ends here: %s", error)
            _close(self._file)
            self._file = None

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            _close(self._file)
            self._file = None


def _close(file: BinaryIO) -> None:
    try:
        file.close()
    except OSError as error:
        _log.error("journal not written to its end: %s", error)


def _mend(path: Path) -> None:
    """Cut a last line that was not written whole: a new entry must not be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = keep = file.seek(0, 2)
        while keep:
            start = max(0, keep - _CHUNK)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            keep = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if keep != end:
            file.truncate(keep)
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


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn what a malformed entry does to its reader into a JournalError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RulebookError) as error:
        raise JournalError(f"{path}: an entry is not what it should be: {type(error).__name__}: {error}") from error


def holds_a_run(folder: Path) -> bool:
    """Return whether a folder holds a run: a process killed before its first whole entry left none."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except OSError:
        return False


def last_plan(folder: Path) -> Any:  # noqa: ANN401
    """Return the planner's state as the newest session in a run folder last wrote it down.

    Raises:
        JournalError: there is no journal there that can be read.
    """
    state: Any = None
    for entry in read(folder):
        if entry["kind"] == "start":
            state = entry["state"]["planner"]
        elif entry["kind"] == "state":
            state = entry["planner"]
    return decoded(state)


def _entries(path: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    whole = 0
    for number, line in enumerate(file, start=1):
        entry = _entry(line)
        if entry is None:
            if whole and next(file, None) is None:
                yield {"kind": "notice", "step": None, "text": f"line {number} was torn and is dropped"}
                return
            raise JournalError(f"{path}:{number}: not a journal entry")
        if number == 1 and entry["kind"] != "start":
            raise JournalError(f"{path}:1: a journal begins with a start entry, not {entry['kind']!r}")
        if entry["kind"] == "start" and entry.get("schema") != SCHEMA:
            raise JournalError(f"{path}:{number}: schema {entry.get('schema')!r}; this version reads {SCHEMA}")
        whole += 1
        yield entry
    if not whole:
        raise JournalError(f"{path}: empty")


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry on a line, or None where it is torn or no entry."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and "kind" in entry else None
