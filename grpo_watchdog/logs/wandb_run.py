"""W&B's local run files (run-ID.wandb), read without W&B: a log of LevelDB's form, its records W&B's protobuf.

The form: https://github.com/google/leveldb/blob/main/doc/log_format.md, the checksum being zlib's crc32. The messages:
wandb/proto/wandb_internal.proto of wandb 0.31.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from grpo_watchdog.logs.records import Record, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "wandb"
_IDENT = b":W&B"
_OPENING = struct.Struct("<4sHB")
_MAGIC, _VERSION = 0xBEE1, 0
_BLOCK = 1 << 15
_HEADER = struct.Struct("<IHB")  # of a piece: checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_LARGEST = 1 << 24  # bytes of a record
_STEP = "_step"  # W&B counts its own calls there
_TYPE = "/_type"
_PACKAGE = "grpo_watchdog.logs"


class _Piece(NamedTuple):
    """A record, or a part of one.

    Attributes:
        kind: whole, the first, one in the middle or the last; 0 where something is missing.
        content: its bytes.
        place: its offset in the file.
    """

    kind: int
    content: bytes
    place: int


def recognises(source: Source) -> bool:
    """Return whether it begins as W&B's files do."""
    return source.head.startswith(_IDENT)


def rows(source: Source) -> Iterator[Row]:
    """Yield a row a call of wandb.log; what is damaged is left out, and said.

    Raises:
        LogError: it was written in another form.
    """
    opening = source.head[: _OPENING.size]
    if len(opening) < _OPENING.size or _OPENING.unpack(opening) != (_IDENT, _MAGIC, _VERSION):
        raise source.error("", f"is a W&B file of another form; version {_VERSION} is read")
    for row in rows_of(_history(source), source):
        row.values.pop(_STEP, None)  # a step of the trainer's own was there, and is surer
        if row.values:
            yield row


def _history(source: Source) -> Iterator[tuple[str, Record]]:
    from google.protobuf.message import (  # type: ignore[import-untyped]  # noqa: PLC0415 - for this format alone
        DecodeError,
    )

    parse = _message().FromString
    for place, content in _contents(source):
        try:
            history = parse(content).history
        except DecodeError:
            source.say(f"the record at byte {place} is none of W&B's and is left out")
            continue
        record, number = _record(history)
        if record:
            yield f"byte {place}", {**record, _STEP: number}


def _record(history: Any) -> tuple[dict[str, object], object]:  # noqa: ANN401 - a message of protobuf
    """Return what was logged and W&B's own count, without media, which hold numbers of their own."""
    record = {_key(item): _loaded(item.value_json) for item in history.item}
    number = record.pop(_STEP, None)
    if history.HasField("step"):
        number = history.step.num
    media = tuple(f"{key.removesuffix(_TYPE)}/" for key in record if key.endswith(_TYPE))
    return {
        key: value
        for key, value in record.items()
        if not key.startswith(("_", *media)) and not (isinstance(value, dict) and "_type" in value)
    }, number


def _key(item: Any) -> str:  # noqa: ANN401 - a message of protobuf
    return item.key or "/".join(item.nested_key)


def _loaded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _contents(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield the place and the bytes of every whole record."""
    parts, size, begun = list[bytes](), 0, 0
    for piece in _pieces(source):
        if piece.kind in (_FULL, _FIRST):
            parts, size, begun = [], 0, piece.place
        elif not parts:
            continue  # its beginning is missing
        size += len(piece.content)
        if not piece.kind:
            parts = []
        elif size > _LARGEST:
            source.say(f"the record at byte {begun} is longer than {_LARGEST} bytes and is left out")
            parts = []
        else:
            parts.append(piece.content)
        if piece.kind in (_FULL, _LAST) and parts:
            yield begun, b"".join(parts)
            parts = []


def _pieces(source: Source) -> Iterator[_Piece]:
    start = 0
    while block := source.stream.read(_BLOCK):
        at = 0 if start else _OPENING.size
        while at + _HEADER.size <= len(block):
            checksum, length, kind = _HEADER.unpack_from(block, at)
            begin, end = at + _HEADER.size, at + _HEADER.size + length
            if not kind and not length and not checksum:
                break  # room that was made beforehand
            if end > len(block) and len(block) < _BLOCK:
                at = len(block) - 1  # is said below
                break
            content = block[begin:end]
            if end > len(block) or zlib.crc32(content, zlib.crc32(bytes((kind,)))) != checksum:
                source.say(f"damaged at byte {start + at}: the block of {_BLOCK} bytes is left out from there on")
                yield _Piece(0, b"", start + at)
                at = _BLOCK
                break
            yield _Piece(kind, content, start + at)
            at = end
        if at < len(block) < _BLOCK and block[at:].strip(b"\0"):
            source.say(f"ends in the middle of a record after byte {start + at}, as a file does that is being written")
        start += len(block)


@cache
def _message() -> Any:  # noqa: ANN401 - a class that protobuf makes
    """Return the class of W&B's records, with the fields that are read and no others."""
    from google.protobuf import (  # type: ignore[import-untyped]  # noqa: PLC0415 - for this format alone
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="grpo_watchdog/wandb_run.proto", package=_PACKAGE, syntax="proto3")

    def message(name: str, **fields: tuple[int, Any, bool]) -> None:
        made = file.message_type.add(name=name)
        for field, (number, type_, repeated) in fields.items():
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            if isinstance(type_, str):
                made.field.add(
                    name=field, number=number, label=label, type=kind.TYPE_MESSAGE, type_name=f".{_PACKAGE}.{type_}"
                )
            else:
                made.field.add(name=field, number=number, label=label, type=type_)

    text = kind.TYPE_STRING
    message("Item", key=(1, text, False), nested_key=(2, text, True), value_json=(16, text, False))
    message("Step", num=(1, kind.TYPE_INT64, False))
    message("History", item=(1, "Item", True), step=(2, "Step", False))
    message("Record", history=(2, "History", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Record"))
