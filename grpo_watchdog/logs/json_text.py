"""JSON text: the whole of a file, parsed; of one that is torn or damaged, what can be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from grpo_watchdog.logs.source import Source

MOST = 1 << 28  # bytes of one document: it has to be held in memory as a whole, which takes some times as much
_SMALL = 1 << 24  # characters up to which keys that stand twice are looked for
_TRIED = 1 << 26  # characters that are looked through for the objects of a torn document
_MOST_DIGITS = 400  # of a whole number; beyond that it is as good as infinite
_SPACE = re.compile(r"[\s,]*")
_OPENS = re.compile(r"\[\s*\{")


def beginning(source: Source) -> str:
    """Return the beginning of a log as text, without the marks and blanks before it."""
    return _decoded(source.head).lstrip("\ufeff \t\r\n")


def _decoded(data: bytes) -> str:
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if wide else "utf-8", errors="replace")


def whole_text(source: Source) -> str:
    """Return the whole of a log as text.

    Raises:
        LogError: it is longer than is held in memory.
    """
    parts, size = list[bytes](), 0
    while chunk := source.stream.read(1 << 20):
        parts.append(chunk)
        size += len(chunk)
        if size > MOST:
            raise source.error(
                "", f"is one JSON document of more than {MOST} bytes; write it as one row a line (JSONL)"
            )
    return _decoded(b"".join(parts)).lstrip("\ufeff")


def documents(source: Source) -> Iterator[object]:
    """Yield what stands in a file: one JSON document as a rule; several behind each other, or the rest of a torn one.

    Raises:
        LogError: nothing in it can be parsed.
    """
    text = whole_text(source)
    notes = list[str]()
    decoder = _decoder(notes if len(text) <= _SMALL else None)
    at, found = _SPACE.match(text, 0).end(), False  # type: ignore[union-attr]
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "pos", at)
            line = text.count("\n", 0, where) + 1
            reason = getattr(error, "msg", "nested too deeply")
            rest = _objects(text, at, decoder)
            if rest:
                source.say(
                    f"line {line}: the JSON breaks off or is damaged ({reason}); {len(rest)} objects before are read"
                )
                yield rest
            elif not found:
                raise source.error(str(line), f"not JSON: {reason}") from None
            else:
                source.say(f"line {line}: what follows is not JSON ({reason}) and is left out")
            break
        found = True
        yield value
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    for note in dict.fromkeys(notes):
        source.say(note)


def _objects(text: str, at: int, decoder: json.JSONDecoder) -> list[object]:
    """Return the whole objects of the longest list of objects in a torn document."""
    best: list[object] = []
    opened = _OPENS.search(text, at)
    tries = max(1, min(100, _TRIED // (len(text) - at)))
    while opened is not None and tries:
        tries -= 1
        found, place = list[object](), opened.end() - 1
        while place < len(text) and text[place] == "{":
            try:
                value, place = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                break
            found.append(value)
            place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        best = max(best, found, key=len)
        opened = _OPENS.search(text, max(place, opened.end()))
    return best


def _decoder(notes: list[str] | None) -> json.JSONDecoder:
    if notes is None:
        return json.JSONDecoder()

    def pairs(given: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(given)
        if len(made) < len(given):
            notes.append("a key stands twice in one object: the last one counts")
        return made

    return json.JSONDecoder(object_pairs_hook=pairs, parse_int=parsed_int)


def parsed_int(digits: str) -> int | float:
    """Return a whole number; one that no float can hold is infinite."""
    if len(digits) > _MOST_DIGITS:
        return -math.inf if digits.startswith("-") else math.inf
    return int(digits)
