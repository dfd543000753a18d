"""Logs: whatever a trainer wrote, as rows. One file a format; a new one is a file here and a line in READERS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from grpo_watchdog.errors import LogError
from grpo_watchdog.logs import (
    console,
    csv,
    journal_log,
    json_rows,
    jsonl,
    notebook,
    parquet,
    tfevents,
    trainer_state,
    wandb_run,
)
from grpo_watchdog.logs.folder import logs_in
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source


class Reader(Protocol):
    """What a format offers."""

    NAME: str

    def recognises(self, source: Source) -> bool:
        """Return whether the beginning looks like this format."""
        ...

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows, in the order of the log."""
        ...


READERS: tuple[Reader, ...] = (  # the surer of itself, the earlier
    tfevents,
    wandb_run,
    parquet,
    journal_log,
    trainer_state,
    notebook,
    json_rows,
    jsonl,
    csv,
    console,
)


class Log(NamedTuple):
    """One run's log, opened: several files of one run in their order.

    Attributes:
        path: what it is called in a report.
        rows: every row; to be read once.
        notices: what the readers had to say, as far as they have read.
        formats: the formats of the files.
    """

    path: str
    rows: Iterator[Row]
    notices: list[str]
    formats: list[str]


@contextmanager
def opened(files: tuple[str, ...], progress: Callable[[int], None] | None = None) -> Iterator[Log]:
    """Open the files of one run; "-" is standard input.

    Args:
        files: in the order of time.
        progress: called with the bytes read since the last call.

    Raises:
        LogError: on reading, where a file is of no known format, or nothing in any can be used.
    """
    notices, formats, sources = list[str](), list[str](), list[Source]()

    def rows() -> Iterator[Row]:
        found = False
        for file in files:
            source = Source(file, progress)
            sources.append(source)
            source.notices = notices
            reader = _reader(source)
            formats.append(reader.NAME)
            for row in reader.rows(source):
                found = True
                yield row
            source.close()
        if not found:
            raise LogError(f"{sources[-1].name}: no row of numbers in it (read as {formats[-1]})")

    try:
        yield Log(_called(files), rows(), notices, formats)
    finally:
        for source in sources:
            source.close()


def _reader(source: Source) -> Reader:
    if not source.head:
        raise source.error("", "is empty")
    for reader in READERS:
        if reader.recognises(source):
            return reader
    known = ", ".join(reader.NAME for reader in READERS)
    raise source.error("", f"is of no format that is known; those are {known}")


def _called(files: tuple[str, ...]) -> str:
    return files[0] if len(files) == 1 else str(Path(files[0]).parent)


__all__ = ["READERS", "Log", "Reader", "Row", "Source", "logs_in", "opened"]
