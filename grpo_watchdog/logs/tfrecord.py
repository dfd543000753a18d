"""TFRecord: the framing of event files: length, its CRC, data, its CRC; every CRC is checked.

What is damaged is passed over where the next record can still be found, and is the end where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack_from

from grpo_watchdog.logs.crc32c import masked
from grpo_watchdog.logs.source import Source

_CHUNK = 8 << 20
_LARGE = 1 << 14  # bytes: no scalar takes so many, and what is not read is not checked
_ABSURD = 1 << 34  # bytes: no record has so many
_HEADER, _FOOTER = 12, 4
_SHORTEST = _HEADER + _FOOTER


def framed(head: bytes) -> bool:
    """Return whether bytes begin with a length and its right CRC."""
    import numpy as np  # noqa: PLC0415 - the package imports without numpy

    if len(head) < _HEADER:
        return False
    crc: int = unpack_from("<I", head, 8)[0]
    return bool(masked(np.frombuffer(head, np.uint8, 8)[None])[0] == crc)


def records(source: Source) -> Iterator[bytes]:
    """Yield the data of every record that is whole and not larger than a scalar can be."""
    rest, done = b"", 0
    while chunk := source.stream.read(_CHUNK):
        data = rest + chunk if rest else chunk
        starts, lengths, end, skip = _walk(data)
        good, broken = _checked(data, starts, lengths, done, source)
        for start, length in good:
            yield data[start : start + length]
        if broken:
            return
        done += end
        rest = data[end:]
        if skip:
            left = skip - len(rest)
            rest, done = b"", done + skip
            if not _passed(source, left):
                source.say(f"the last record, at byte {done - skip}, is cut off; what is before it is read")
                return
    if rest:
        source.say(f"the last record, at byte {done}, is cut off; what is before it is read")


def _walk(data: bytes) -> tuple[list[int], list[int], int, int]:
    """Return where the data of whole records begin, how long they are, where the walk ended, and what to skip then."""
    starts, lengths = list[int](), list[int]()
    at, size = 0, len(data)
    while at + _SHORTEST <= size:
        length = unpack_from("<Q", data, at)[0]
        if at + _SHORTEST + length > size:
            if _LARGE < length < _ABSURD and framed(data[at : at + _HEADER]):
                return starts, lengths, at, length + _SHORTEST
            if length > _LARGE:  # a wrong length: _checked says so
                starts.append(at + _HEADER)
                lengths.append(-1)
            break
        starts.append(at + _HEADER)
        lengths.append(length)
        at += _SHORTEST + length
    return starts, lengths, at, 0


def _checked(
    data: bytes, starts: list[int], lengths: list[int], done: int, source: Source
) -> tuple[list[tuple[int, int]], bool]:
    """Return the records whose CRCs are right, in order, and whether the framing is broken after them."""
    import numpy as np  # noqa: PLC0415

    if not starts:
        return [], False
    array = np.frombuffer(data, np.uint8)
    place, length = np.array(starts), np.array(lengths)
    windows = np.lib.stride_tricks.sliding_window_view
    heads = windows(array, _HEADER)[place - _HEADER]
    framing = masked(heads[:, :8]) == np.ascontiguousarray(heads[:, 8:]).view("<u4")[:, 0]
    framing &= length >= 0
    broken = not framing.all()
    if broken:
        first = int(np.argmin(framing))
        source.say(f"damaged at byte {done + starts[first] - _HEADER}: what is before it is read")
        place, length = place[:first], length[:first]
    kept = length <= _LARGE
    right = kept.copy()
    for size in np.unique(length[kept]):
        mine = np.flatnonzero(length == size)
        rows = windows(array, size + _FOOTER)[place[mine]]
        right[mine] = masked(rows[:, :size]) == np.ascontiguousarray(rows[:, size:]).view("<u4")[:, 0]
    wrong = np.flatnonzero(kept & ~right)
    if len(wrong):
        source.say(
            f"{len(wrong)} record(s) are damaged and passed over, the first at byte {done + int(place[wrong[0]])}"
        )
    chosen = np.flatnonzero(right)
    return list(zip(place[chosen].tolist(), length[chosen].tolist(), strict=True)), broken


def _passed(source: Source, size: int) -> bool:
    """Pass over bytes; return whether they were there."""
    while size > 0:
        chunk = source.stream.read(min(size, _CHUNK))
        if not chunk:
            return False
        size -= len(chunk)
    return True
