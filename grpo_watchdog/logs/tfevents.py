"""TensorBoard's event files: the record framing and the compiled protobuf, without the event accumulator.

A record is its length (8 bytes), the checksum of that (4), an event, the checksum of the event (4); see
tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from grpo_watchdog.logs.regroup import by_step
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "tfevents"
_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_FOOTER = 4
_CHUNK = 1 << 22  # bytes read at once
_LARGEST = 1 << 20  # bytes of a record that is looked into: the event of a scalar has under a hundred
_SHORTEST = 4  # bytes of one that is: what is shorter holds nothing
_DROPPED = ("eval/", "_hparams_/")
_ENDING = frozenset(f"train/{name}" for name in (  # what transformers writes once, behind the last row
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"
))  # fmt: skip


class _Chunk(NamedTuple):
    """Some records that lie in one buffer.

    Attributes:
        buffer: what was read.
        place: the offset of its first byte in the file.
        spans: where in it each event begins and ends.
    """

    buffer: bytes
    place: int
    spans: Iterable[tuple[int, int]]


def recognises(source: Source) -> bool:
    """Return whether it begins with a length that has the right checksum."""
    return len(source.head) >= _HEADER.size and _sound_length(source.head)


def rows(source: Source) -> Iterator[Row]:
    """Yield a row a step; what is damaged is left out, and said."""
    from grpo_watchdog.logs.scalar_events import ScalarEvents  # noqa: PLC0415 - protobuf, for this format alone

    place = 0

    def damaged(start: int) -> None:
        source.say(f"the record at byte {place + start - _HEADER.size} is no event and is left out")

    events = ScalarEvents(lambda tag: not tag.startswith(_DROPPED) and tag not in _ENDING, damaged)

    def scalars() -> Iterator[Iterator[tuple[int, str, float]]]:
        nonlocal place
        for chunk in _chunks(source):
            place = chunk.place
            yield events.read(chunk.buffer, chunk.spans)

    yield from by_step(chain.from_iterable(scalars()))


def _chunks(source: Source) -> Iterator[_Chunk]:
    buffer, place, large = b"", 0, 0
    while True:
        read = source.stream.read(_CHUNK)
        buffer += read
        starts, lengths, end = _walked(buffer)
        spans, damaged = _sound(buffer, place, starts, lengths, source)
        yield _Chunk(buffer, place, spans)
        if damaged is None and len(buffer) - end >= _HEADER.size and not _sound_length(buffer[end : end + 12]):
            damaged = end
        if damaged is not None:
            source.say(f"the record at byte {place + damaged} is damaged where its length stands: the rest is left out")
            return
        buffer, place = buffer[end:], place + end
        if len(buffer) >= _HEADER.size and (size := _LENGTH.unpack_from(buffer)[0]) > _LARGEST:
            large += 1
            buffer, place = _behind(source, buffer, size + _HEADER.size + _FOOTER), place + size + 16
        elif not read:
            if buffer:
                source.say(f"ends in the middle of the record at byte {place}, as a file does that is being written")
            break
    if large:
        source.say(f"{large} records of more than {_LARGEST} bytes are passed over: no scalars are that long")


def _walked(buffer: bytes) -> tuple[list[int], list[int], int]:
    """Return where the events of whole records begin, how long they are, and the end of the last."""
    starts, lengths, at = list[int](), list[int](), 0
    length_at, size, last = _LENGTH.unpack_from, len(buffer), len(buffer) - _HEADER.size - _FOOTER
    while at <= last:
        (length,) = length_at(buffer, at)
        end = at + length + 16
        if end > size or length > _LARGEST:
            break
        starts.append(at + 12)
        lengths.append(length)
        at = end
    return starts, lengths, at


def _sound(
    buffer: bytes, place: int, starts: list[int], lengths: list[int], source: Source
) -> tuple[Iterable[tuple[int, int]], int | None]:
    """Return the spans whose checksums are right, and where a length is damaged: behind it nothing can be told."""
    if not starts:
        return [], None
    import numpy as np  # noqa: PLC0415 - slow, and for this format alone

    from grpo_watchdog.logs.checksums import masked, words_at  # noqa: PLC0415 - the same

    begins, sizes = np.array(starts, np.int64), np.array(lengths, np.int64)
    framed = masked(buffer, begins - 12, np.full_like(sizes, 8)) == words_at(buffer, begins - 4)
    damaged = None if framed.all() else int(np.argmin(framed))
    begins, sizes = begins[:damaged], sizes[:damaged]
    some = sizes >= _SHORTEST
    begins, sizes = begins[some], sizes[some]
    whole = masked(buffer, begins, sizes) == words_at(buffer, begins + sizes)
    for start in begins[~whole].tolist():
        source.say(f"the record at byte {place + start - 12} is damaged and is left out")
    begins, sizes = begins[whole], sizes[whole]
    spans = zip(begins.tolist(), (begins + sizes).tolist(), strict=True)
    return spans, None if damaged is None else starts[damaged] - 12


def _sound_length(header: bytes) -> bool:
    from grpo_watchdog.logs.checksums import masked_one  # noqa: PLC0415 - NumPy, for this format alone

    return masked_one(header[: _LENGTH.size]) == _HEADER.unpack_from(header)[1]


def _behind(source: Source, buffer: bytes, size: int) -> bytes:
    """Return what lies behind a record, and has been read."""
    left = size - len(buffer)
    while left > 0 and (read := source.stream.read(min(left, _CHUNK))):
        left -= len(read)
    return buffer[size:]
