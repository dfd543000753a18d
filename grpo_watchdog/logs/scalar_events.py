"""Scalar events: the scalars in the events of TensorBoard.

The event of one scalar is the same bytes every time, but for its time, its step and its value. What protobuf has made
of such an event once is kept as a layout: the bytes around the value. Any event with these bytes in these places would
be taken apart in the same way, since both time and value have a width that is fixed; so it is looked up instead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # it ships no types
from tensorboard.compat.proto.event_pb2 import Event

Scalar = tuple[int, str, float]
Part = tuple[int, dict[str, float]]
Span = tuple[int, int, float]  # where an event begins and ends, and its last four bytes as a number

_TIME, _STEP = 0x09, 0x10  # the bytes in front of both, as protobuf has them
_BEHIND = 9  # bytes: the time and what is in front of it
_MORE = 0x80  # the bit that says that the number goes on
_WIDEST = 5  # bytes of a step that is looked up; a longer one goes through protobuf
_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")
_PROBES = (1.5, -2.25)
_MOST_PLACES = 16  # at which a value may stand
_LONGEST_LEARNED = 2048  # bytes of an event
_MOST_LAYOUTS = 20_000
_MOST_FAILURES = 1000  # to learn; then no more is tried
_LONGEST_TAG = 1000  # characters
_KINDS = {  # of tensors, by the number of their type: the field of its values, and how raw bytes are read
    1: ("float_val", "<f"), 2: ("double_val", "<d"), 3: ("int_val", "<i"), 4: ("int_val", "<B"), 5: ("int_val", "<h"),
    6: ("int_val", "<b"), 9: ("int64_val", "<q"), 14: ("half_val", "<H"), 17: ("int_val", "<H"), 19: ("half_val", "<H"),
    22: ("uint32_val", "<I"), 23: ("uint64_val", "<Q"),
}  # fmt: skip
_BFLOAT16, _HALF = 14, 19


class ScalarEvents:
    """Reads events, and remembers how they are laid out.

    Args:
        wanted: whether the values of a tag are.
        damaged: called with the offset of what is no event, though its checksum is right.
    """

    def __init__(self, wanted: Callable[[str], bool], damaged: Callable[[int], None]) -> None:
        self._wanted, self._damaged = wanted, damaged
        self._tags: dict[bytes, str] = {}  # of layouts that end with a float; "" where it is not wanted
        self._inner: dict[tuple[int, bytes, bytes], tuple[struct.Struct, str]] = {}
        self._places: dict[int, list[tuple[int, int]]] = {}  # by length: where a value within begins and ends
        self._failures = 0

    def read(self, buffer: bytes, spans: Iterable[Span]) -> Iterator[Part]:  # noqa: C901 - runs once for each scalar
        """Yield the scalars of events, those of one step that stand together as one part."""
        known, begins_with = self._tags.get, buffer.startswith
        now, part = 0, dict[str, float]()
        same: bytes | tuple[()] = ()  # what the step looks like that is now; () is like nothing
        width = 0
        for start, end, number in spans:
            at = start + _BEHIND
            if begins_with(same, at):
                at += width
            else:
                step, width = _step(buffer, at)
                same = buffer[at : at + (width or 1)] if width or buffer[at] != _STEP else ()
                at += width
                if step != now:
                    if part:
                        yield now, part
                    now, part = step, {}
            tag = known(buffer[at : end - 4]) if buffer[start] == _TIME else None
            if tag is None:
                for step, name, value in self._other(buffer[start:end], now, at - start, start):
                    if step != now or name in part:
                        if part:
                            yield now, part
                        same = same if step == now else ()
                        now, part = step, {}
                    part[name] = value
            elif tag:
                if tag in part:
                    yield now, part
                    part = {}
                part[tag] = number
        if part:
            yield now, part

    def _other(self, event: bytes, step: int, at: int, start: int) -> Iterator[Scalar]:
        """Yield the scalars of an event that does not end with its value, or is new."""
        places = self._places.get(len(event) - at, ()) if event[0] == _TIME else ()
        for first, last in places:
            known = self._inner.get((first, event[at : at + first], event[at + last :]))
            if known is not None:
                if known[1]:
                    yield step, known[1], known[0].unpack_from(event, at + first)[0]
                return
        try:
            parsed = Event.FromString(event)
        except DecodeError:
            self._damaged(start)
            return
        values = parsed.summary.value
        for value in values:
            number = _number(value)
            if number is not None and 0 < len(value.tag) <= _LONGEST_TAG and self._wanted(value.tag):
                yield parsed.step, value.tag, number
        if len(values) == 1 and parsed.step == step and event[0] == _TIME and len(event) <= _LONGEST_LEARNED:
            self._learn(event[at:], values[0])

    def _learn(self, tail: bytes, value: Any) -> None:  # noqa: ANN401 - a message of protobuf
        number = _number(value)
        full = len(self._tags) + len(self._inner) >= _MOST_LAYOUTS or self._failures >= _MOST_FAILURES
        if number is None or len(value.tag) > _LONGEST_TAG or full:
            return
        tag = value.tag if self._wanted(value.tag) else ""
        for kind in (_FLOAT, _DOUBLE):
            for first in _candidates(tail, number, kind):
                last = first + kind.size
                if not _stands(tail, first, kind, value.tag):
                    continue
                if kind is _FLOAT and last == len(tail):
                    self._tags[tail[:first]] = tag
                    return
                self._inner[first, tail[:first], tail[last:]] = kind, tag
                places = self._places.setdefault(len(tail), [])
                if (first, last) not in places and len(places) < _MOST_PLACES:
                    places.append((first, last))
                return
        self._failures += 1


def _step(buffer: bytes, at: int) -> tuple[int, int]:
    """Return the step that stands at a place and its width; none is 0, and so is one that is too wide."""
    if buffer[at] != _STEP:
        return 0, 0
    step = 0
    for place, byte in enumerate(buffer[at + 1 : at + 1 + _WIDEST]):
        step |= (byte & ~_MORE) << (7 * place)
        if byte < _MORE:
            return step, place + 2
    return 0, 0


def _candidates(tail: bytes, number: float, kind: struct.Struct) -> list[int]:
    """Return the places at which a number may stand, the last first."""
    try:
        packed = kind.pack(number)
    except OverflowError:
        return []
    found, end = list[int](), len(tail)
    while len(found) < _MOST_PLACES and (place := tail.rfind(packed, 0, end)) >= 0:
        found.append(place)
        end = place + kind.size - 1
    return found


def _stands(tail: bytes, first: int, kind: struct.Struct, tag: str) -> bool:
    """Return whether the value stands there: other numbers in its place are read as those, and nothing else changes."""
    for step, probe in enumerate(_PROBES, 1):
        changed = tail[:first] + kind.pack(probe) + tail[first + kind.size :]
        try:
            event = Event.FromString(bytes((_TIME, *bytes(8), _STEP, step)) + changed)
        except DecodeError:
            return False
        values = event.summary.value
        if event.step != step or [(v.tag, _number(v)) for v in values] != [(tag, probe)]:
            return False
    return True


def _number(value: Any) -> float | None:  # noqa: ANN401 - a message of protobuf
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    return _only(value.tensor) if kind == "tensor" else None


def _only(tensor: Any) -> float | None:  # noqa: ANN401 - a message of protobuf
    """Return the number of a tensor that holds one; none in it is zero, as TensorFlow reads it."""
    if tensor.dtype not in _KINDS or prod(dim.size for dim in tensor.tensor_shape.dim) != 1:
        return None
    field, form = _KINDS[tensor.dtype]
    given = getattr(tensor, field)
    if tensor.tensor_content:
        if len(tensor.tensor_content) != struct.calcsize(form):
            return None
        (number,) = struct.unpack(form, tensor.tensor_content)
    elif len(given) > 1:
        return None
    else:
        number = given[0] if given else 0
    if tensor.dtype == _HALF:
        (number,) = struct.unpack("<e", struct.pack("<H", number & 0xFFFF))
    elif tensor.dtype == _BFLOAT16:
        (number,) = struct.unpack("<f", struct.pack("<HH", 0, number & 0xFFFF))
    return float(number)
