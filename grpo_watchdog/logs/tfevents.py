"""TensorBoard's event files: the record framing and the compiled protobuf, without the event accumulator.

A record is its length (8 bytes), the checksum of that (4), an event, the checksum of the event (4); see
tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from grpo_watchdog.logs.regroup import Part, by_step
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.short_checksum import masked_crc
from grpo_watchdog.logs.source import Source

Span = tuple[int, int, float]

NAME = "tfevents"
_HEADER = struct.Struct("<QI")
_COUNTED = 8  # bytes of the length, which have a checksum of their own
_AROUND = _HEADER.size + 4  # bytes that a record has beside its event
_MOST_HEADERS = 1 << 16
_CHUNK = 1 << 22  # bytes read at once
_LARGEST = 1 << 20  # bytes of a record that is looked into: the event of a scalar has under a hundred
_SHORTEST = 12  # bytes of one that is: what is shorter holds no scalar
_DROPPED = ("eval/", "_hparams_/")
_ENDING = frozenset(f"train/{name}" for name in (  # what transformers writes once, behind the last row
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"
))  # fmt: skip


class _Chunk(NamedTuple):
    """Some records that lie in one buffer.

    Attributes:
        buffer: what was read.
        place: the offset of its first byte in the file.
        spans: where in it each event begins and ends, and its last four bytes as a number.
    """

    buffer: bytes
    place: int
    spans: Iterable[Span]


def recognises(source: Source) -> bool:
    """Return whether it begins with a length that has the right checksum."""
    header = source.head[: _HEADER.size]
    return len(header) == _HEADER.size and _length(header) is not None


def rows(source: Source) -> Iterator[Row]:
    """Yield a row a step; what is damaged is left out, and said."""
    from grpo_watchdog.logs.scalar_events import ScalarEvents  # noqa: PLC0415 - protobuf, for this format alone

    place = 0

    def damaged(start: int) -> None:
        source.say(f"the record at byte {place + start - _HEADER.size} is no event and is left out")

    events = ScalarEvents(lambda tag: not tag.startswith(_DROPPED) and tag not in _ENDING, damaged)

    def parts() -> Iterator[Iterator[Part]]:
        nonlocal place
        for chunk in _chunks(source):
            place = chunk.place
            yield events.read(chunk.buffer, chunk.spans)

    yield from by_step(chain.from_iterable(parts()))


def _chunks(source: Source) -> Iterator[_Chunk]:
    buffer, place, large = b"", 0, 0
    headers: dict[bytes, int] = {}
    while True:
        read = source.stream.read(_CHUNK)
        buffer += read
        starts, lengths, end = _walked(buffer, headers)
        yield _Chunk(buffer, place, _sound(buffer, place, starts, lengths, source))
        buffer, place = buffer[end:], place + end
        size = _length(buffer[: _HEADER.size]) if len(buffer) >= _HEADER.size else 0
        if size is None:
            source.say(f"the record at byte {place} is damaged where its length stands: the rest is left out")
            return
        if size > _LARGEST:
            large += 1
            buffer, place = _behind(source, buffer, size + _AROUND), place + size + _AROUND
        elif not read:
            if buffer:
                source.say(f"ends in the middle of the record at byte {place}, as a file does that is being written")
            break
    if large:
        source.say(f"{large} records of more than {_LARGEST} bytes are passed over: no scalars are that long")


def _walked(buffer: bytes, headers: dict[bytes, int]) -> tuple[list[int], list[int], int]:
    """Return where the events of whole records begin, how long they are, and the end of the last.

    Args:
        buffer: begins with a record.
        headers: those that were found sound, and the lengths in them; there are few.
    """
    starts, lengths, at = list[int](), list[int](), 0
    known, size = headers.get, len(buffer)
    while True:
        header = buffer[at : at + 12]
        length = known(header)
        if length is None:
            length = _length(header) if len(header) == _HEADER.size else None
            if length is None or length > _LARGEST:
                return starts, lengths, at
            if len(headers) < _MOST_HEADERS:
                headers[header] = length
        end = at + length + _AROUND
        if end > size:
            return starts, lengths, at
        starts.append(at + 12)
        lengths.append(length)
        at = end


def _length(header: bytes) -> int | None:
    """Return the length in the header of a record, or None where its checksum is not right."""
    length, checksum = _HEADER.unpack(header)
    return int(length) if masked_crc(header[:_COUNTED]) == checksum else None


def _sound(buffer: bytes, place: int, starts: list[int], lengths: list[int], source: Source) -> Iterable[Span]:
    """Return the spans whose checksums are right."""
    if not starts:
        return ()
    import numpy as np  # noqa: PLC0415 - slow, and for this format alone

    from grpo_watchdog.logs.checksums import masked, words_at  # noqa: PLC0415 - the same

    begins, sizes = np.array(starts, np.int64), np.array(lengths, np.int64)
    some = sizes >= _SHORTEST
    begins, sizes = begins[some], sizes[some]
    whole = masked(buffer, begins, sizes) == words_at(buffer, begins + sizes)
    for start in begins[~whole].tolist():
        source.say(f"the record at byte {place + start - _HEADER.size} is damaged and is left out")
    begins, ends = begins[whole], (begins + sizes)[whole]
    with np.errstate(invalid="ignore"):  # of a signalling not-a-number
        numbers = words_at(buffer, ends - 4).view(np.float32).astype(float)
    return zip(begins.tolist(), ends.tolist(), numbers.tolist(), strict=True)


def _behind(source: Source, buffer: bytes, size: int) -> bytes:
    """Return what lies behind a record, and has been read."""
    left = size - len(buffer)
    while left > 0 and (read := source.stream.read(min(left, _CHUNK))):
        left -= len(read)
    return buffer[size:]
