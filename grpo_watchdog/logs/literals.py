"""Literals: Python dicts and JSON objects that stand somewhere in a line of text; nothing is ever evaluated."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from grpo_watchdog.logs.numbers import text_number

_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[{}\[\](),:])|'(?P<one>[^'\\\n]*(?:\\.[^'\\\n]*)*)'|"(?P<two>[^"\\\n]*(?:\\.[^"\\\n]*)*)\""""
    r"""|(?P<bare>[^\s{}\[\](),:'"]+))"""
)
_BEGINS = re.compile(r"\{(?=\s*(?:['\"}]|$))")
_DEEPEST = 16
_MOST_FAILURES = 32  # beginnings on one line that are no dicts
_JSON = json.JSONDecoder()
_NONE = frozenset(("None", "null"))
_TRUTH = {"True": True, "true": True, "False": False, "false": False}


class Found(NamedTuple):
    """What stands in a text.

    Attributes:
        dicts: each dict and where it begins.
        opened: where one begins that does not end in this text; -1 for nowhere.
        end: where the last one ends.
    """

    dicts: list[tuple[int, dict[str, object]]]
    opened: int
    end: int


class _Broken(Exception):  # noqa: N818 - never leaves this file
    """It is no literal."""


class _Ends(Exception):  # noqa: N818 - never leaves this file
    """The text ends before the literal does."""


def dicts_in(text: str) -> Found:
    """Return every dict in a text with text or numbers as its keys, and whether one goes on behind its end."""
    found: list[tuple[int, dict[str, object]]] = []
    at = failures = 0
    while failures < _MOST_FAILURES:
        begins = _BEGINS.search(text, at)
        if begins is None:
            break
        plain = _plain(text, begins.start())
        if plain is not None:
            found.append((begins.start(), plain[0]))
            at = plain[1]
            continue
        scanner = _Scanner(text, begins.end())
        try:
            value = scanner.mapping(0)
        except _Ends:
            return Found(found, begins.start(), at)
        except _Broken:
            failures += 1
            at = begins.end()
        else:
            found.append((begins.start(), value))
            at = scanner.at
    return Found(found, -1, at)


def _plain(text: str, at: int) -> tuple[dict[str, object], int] | None:
    """Return a dict of text and numbers, and where it ends, the fast way; None where it is not that plain."""
    end = text.find("}", at) + 1
    part = text[at:end]
    if not part or '"' in part or "\\" in part:
        return None
    try:
        made = _JSON.decode(part.replace("'", '"'))
    except ValueError:
        return None
    return (made, end) if isinstance(made, dict) else None


class _Scanner:
    """Reads literals from left to right."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def _next(self) -> tuple[str, str]:
        """Return the kind of the next token and its text, and go behind it."""
        token = _TOKEN.match(self.text, self.at)
        if token is None:
            raise _Broken if self.text[self.at :].strip() else _Ends
        self.at = token.end()
        kind = token.lastgroup or ""
        return ("text" if kind in ("one", "two") else kind), token[kind]

    def _is(self, mark: str) -> bool:
        """Go behind a mark, if it comes next."""
        before = self.at
        if self._next() == ("mark", mark):
            return True
        self.at = before
        return False

    def mapping(self, depth: int) -> dict[str, object]:
        """Read what follows an opening brace."""
        if depth > _DEEPEST:
            raise _Broken
        made: dict[str, object] = {}
        while not self._is("}"):
            kind, key = self._next()
            if kind == "mark" or self._next() != ("mark", ":"):
                raise _Broken
            made[key] = self._value(depth)
            if not self._is(","):
                if self._is("}"):
                    break
                raise _Broken
        return made

    def _value(self, depth: int) -> object:
        kind, text = self._next()
        if kind == "text":
            return text
        if kind == "bare":
            return self._bare(text, depth)
        if text == "{":
            return self.mapping(depth + 1)
        if text in "[(":
            return self._items("]" if text == "[" else ")", depth + 1)
        raise _Broken

    def _items(self, closing: str, depth: int) -> list[object]:
        """Read a list, a tuple or what a call is given; NumPy writes no commas."""
        if depth > _DEEPEST:
            raise _Broken
        items: list[object] = []
        while not self._is(closing):
            items.append(self._value(depth))
            self._is(",")
        return items

    def _bare(self, text: str, depth: int) -> object:
        """Read a number, a name, or a call such as np.float64(0.1) and tensor(1.5, device='cuda:0')."""
        if self.at < len(self.text) and self.text[self.at] == "(":
            self.at += 1
            items = self._items(")", depth + 1)
            return items[0] if items else None
        if text in _NONE:
            return None
        value = text_number(text)
        return _TRUTH.get(text, text) if value is None else value
