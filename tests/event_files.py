"""Event files for tests: written by TensorBoard's own writer, or framed here where many scalars are wanted fast."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from grpo_watchdog.errors import LogError
from grpo_watchdog.logs import opened
from grpo_watchdog.logs.checksums import masked

Point = tuple[int, str, float]
VERSION = Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString()
Rows = list[tuple[int | None, dict[str, float]]]


def scalar(step: int, tag: str, value: float) -> Any:  # noqa: ANN401 - a message of protobuf
    """Return the event of one scalar as most writers have it."""
    return Event(wall_time=1.5, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def written(folder: Path, events: Iterable[Any]) -> Path:
    """Return an event file by TensorBoard's own writer."""
    writer = EventFileWriter(str(folder))
    for event in events:
        writer.add_event(event)
    writer.close()
    (file,) = folder.glob("*tfevents*")
    return file


def framed(contents: Iterable[bytes]) -> bytes:
    """Return records with their lengths and checksums."""
    listed = [struct.pack("<Q", len(content)) + content for content in contents]
    buffer = bytes(8) + b"".join(listed)
    sizes = np.array([len(record) for record in listed])
    starts = 8 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    lengths = masked(buffer, starts, np.full_like(sizes, 8)).tolist()
    data = masked(buffer, starts + 8, sizes - 8).tolist()
    return b"".join(
        record[:8] + struct.pack("<I", head) + record[8:] + struct.pack("<I", tail)
        for record, head, tail in zip(listed, lengths, data, strict=True)
    )


def read(path: Path) -> tuple[Rows, list[str]]:
    """Return the rows of a log, and the notices."""
    with opened((str(path),)) as log:
        rows = [(row.step, row.values) for row in log.rows]
        return rows, log.notices


def read_or_none(path: Path) -> tuple[Rows, list[str]]:
    """Return the rows and the notices; where nothing can be read, none and what the error says."""
    try:
        return read(path)
    except LogError as error:
        return [], [str(error)]


def file_of(folder: Path, points: list[Point]) -> Path:
    path = folder / "events.out.tfevents.1.host"
    path.write_bytes(framed([VERSION, *(scalar(*point).SerializeToString() for point in points)]))
    return path


def rows_in(folder: Path, contents: list[bytes]) -> tuple[Rows, list[str]]:
    path = folder / "events.out.tfevents.2.host"
    path.write_bytes(framed([VERSION, *contents]))
    return read(path)
