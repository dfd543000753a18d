"""YAML with places: plain data, and for each piece of it the file, line and column where it stands.

The core schema of YAML 1.2, read from the parser's events: `1e-6` is a number, `on` is a word. Anchors, aliases,
tags, duplicate keys and several documents are refused: a rulebook is one page that reads the same to a person
and to a machine. Nothing is ever constructed but dicts, lists, strings, numbers, booleans and None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from grpo_watchdog.errors import Problem, RulebookError

Place = tuple[str, int, int]
Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
_MAX_DIGITS = 400  # more than any finite float has before its point

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((sign + dot for sign in ("", "+") for dot in (".inf", ".Inf", ".INF")), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


_ALIAS = "anchors and aliases are not allowed; write it out"
_BOMB = 20  # of them: then it is no slip, and one line says it


class Places:
    """Where each piece of some data stands: its value, and the word that names it."""

    def __init__(self, root: Place) -> None:
        """Know only where the whole stands."""
        self._values: dict[Key, Place] = {(): root}
        self._words: dict[Key, Place] = {}

    def value(self, key: Key) -> Place:
        """Return where a value stands, or where the nearest parent does that stands anywhere."""
        while key not in self._values:
            key = key[:-1]
        return self._values[key]

    def word(self, key: Key) -> Place:
        """Return where the word stands that names a value, else where the value does."""
        return self._words.get(key) or self.value(key)

    def enter(self, key: Key, value: Place, word: Place | None = None) -> None:
        """Enter one piece."""
        self._values[key] = value
        if word is not None:
            self._words[key] = word

    def graft(self, at: Key, other: Places) -> None:
        """Replace everything at and below a key by what another has there."""
        for mine, theirs in ((self._values, other._values), (self._words, other._words)):
            for key in [key for key in mine if key[: len(at)] == at]:
                del mine[key]
            mine.update({key: place for key, place in theirs.items() if key[: len(at)] == at})


class Source:
    """One parsed file.

    Attributes:
        data: plain dicts, lists, strings, numbers, booleans and None.
        places: where each piece of it stands.
        problems: what is wrong with the page although it could be read to its end.
        spoiled: the keys of what is wrong: what stands there says nothing.
    """

    def __init__(self, path: Path) -> None:
        """Read and parse.

        Raises:
            RulebookError: the file is absent, too large, not UTF-8 or not YAML at all; says all it found.
        """
        self.name = str(path)
        self.data: Any = None
        self.places = Places((self.name, 1, 1))
        self.problems: list[Problem] = []
        self.spoiled: set[Key] = set()
        text = _text(path, self.name)
        try:
            self._document(YAML(typ="safe", pure=True).parse(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            what = ", ".join(filter(None, (error.problem, error.context)))
            self._give_up(f"not YAML: {what}", line, column)
        except YAMLError as error:  # a character that YAML forbids: no mark, but a position
            before = text[: getattr(error, "position", 0)]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            self._give_up(f"not YAML: {str(error).splitlines()[0]}", line, column)
        except ValueError as error:  # what the parser itself stumbles over
            self._give_up(f"not YAML: {error}", 1, 1)

    def _give_up(self, message: str, line: int, column: int) -> None:
        raise RulebookError([*self.problems, Problem(self.name, line, column, message)]) from None

    def _document(self, events: Iterator[Any]) -> None:
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.problems.append(Problem(*self._place(event), "a second document; a rulebook is one document"))
                    return
            elif isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent | AliasEvent):
                self.data = self._node(event, events, ())

    def _node(self, event: Any, events: Iterator[Any], key: Key) -> Any:  # noqa: ANN401
        if len(key) > MAX_DEPTH:
            self._give_up(f"nested more than {MAX_DEPTH} deep", *self._place(event)[1:])
        if isinstance(event, AliasEvent) or event.anchor:
            self._refuse(key, event, _ALIAS)
            aliases = [problem for problem in self.problems if problem.message == _ALIAS]
            if len(aliases) > _BOMB:
                first = aliases[0]._replace(message=f"{_ALIAS}; there are more than {_BOMB} of them")
                raise RulebookError([first])
        if not isinstance(event, AliasEvent) and event.tag is not None:
            self._refuse(key, event, f"tag {event.tag} is not allowed; plain values only")
        if isinstance(event, SequenceStartEvent):
            return self._sequence(events, key)
        if isinstance(event, MappingStartEvent):
            return self._mapping(events, key)
        if isinstance(event, AliasEvent):
            return None
        return event.value if event.style else _plain(event.value)

    def _sequence(self, events: Iterator[Any], key: Key) -> list[Any]:
        built: list[Any] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            at = (*key, len(built))
            self.places.enter(at, self._place(event))
            built.append(self._node(event, events, at))
        return built

    def _mapping(self, events: Iterator[Any], key: Key) -> dict[str, Any]:
        built: dict[str, Any] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            word = self._place(event)
            if not isinstance(event, ScalarEvent) or event.anchor or event.tag is not None:
                self.problems.append(Problem(*word, "a key must be a plain word"))
                self._node(event, events, (*key, ""))
                self._node(next(events), events, (*key, ""))
                continue
            name, value = event.value, next(events)
            at = (*key, name)
            if name in built:
                first = self.places.word(at)[1]
                self.problems.append(Problem(*word, f"key {_cut(name)!r} stands twice, first in line {first}"))
                self._node(value, events, (*key, ""))
                continue
            self.places.enter(at, self._place(value) if isinstance(value, ScalarEvent | AliasEvent) else word, word)
            built[name] = self._node(value, events, at)
        return built

    def _refuse(self, key: Key, event: Any, message: str) -> None:  # noqa: ANN401
        self.problems.append(Problem(*self._place(event), message))
        self.spoiled.add(key)

    def _place(self, event: Any) -> Place:  # noqa: ANN401
        return (self.name, event.start_mark.line + 1, event.start_mark.column + 1)


def _text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _fault(name, f"too large; a rulebook has at most {MAX_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise _fault(name, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line, column = raw[: error.start].count(b"\n") + 1, error.start - raw.rfind(b"\n", 0, error.start)
        raise _fault(name, f"byte {error.start} is not UTF-8", line, column) from None
    except ValueError as error:  # a NUL in the path
        raise _fault(name, f"cannot be read: {error}") from None


def _plain(text: str) -> Any:  # noqa: ANN401
    """Return what an unquoted scalar means in the core schema of YAML 1.2."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < _MAX_DIGITS:
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)  # noqa: PLR2004
    return float(text) if _INT.fullmatch(text) or _FLOAT.fullmatch(text) else text


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004


def _fault(name: str, message: str, line: int = 1, column: int = 1) -> RulebookError:
    return RulebookError([Problem(name, line, column, message)])
