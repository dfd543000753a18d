"""Told: what the lines of a console log tell, put together where it stands on several of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from grpo_watchdog.logs.literals import Found, dicts_in
from grpo_watchdog.logs.pairs import Line, cleaned, pairs_in, step_in
from grpo_watchdog.logs.records import is_evaluation, row_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source
from grpo_watchdog.logs.trainer_state import MEASURED

_LONGEST = 1 << 18  # characters of a line that are looked at
_LONGEST_DICT = 1 << 16  # characters of a dict over several lines
_FAR = 60  # lines: what stands further below a step is not about it
_SILENT = 200_000  # lines after which a text without a single row is none
_NAMED = re.compile(r"(?i)([a-z][a-z_ ]{0,40}?)[ _:=#\[(]{1,3}(\d{1,15})(?:/\d+)?[\])]?\s{0,3}[:=|-]?\s{0,3}$")
_NO_STEP = re.compile(r"(?i)(rank|worker|gpu|device|pid|node|epoch|sample|example|line|seed)s?$")
_TELLS = re.compile(r"[\d{]|nan|inf|NaN")  # what is in every line that tells anything
_METRIC = re.compile(  # one of these stands in a row that is no noise
    r"(?i)loss|reward|\bkl|kl\b|_kl|entrop|grad|norm|score|return|adv|\bpg|\blr\b|learning|len|acc|ratio|clip|ppl|perplex|"
    r"value|policy|actor|critic|success|\bwin|\brm\b|\bret\b"
)
_DIGITS = str.maketrans("123456789", "0" * 9)
_MOST_DULL, _LONGEST_DULL = 10_000, 400  # shapes of lines that are kept; characters


class Told(NamedTuple):
    """A row, and the style it was printed in."""

    style: str
    row: Row


class Teller:
    """Puts together what stands on several lines."""

    def __init__(self, source: Source, run: str) -> None:
        self._source, self._run = source, run
        self._mark = ""
        self._held: list[tuple[int, str]] = []  # the lines of a dict that does not end on its line
        self._size = self._braces = 0
        self._line: Line | None = None  # the step that the lines are about
        self._values: dict[str, float] = {}
        self._at = 0
        self._seen: set[str] = set()
        self._epoch, self._raw, self._total, self._offset = -1, -1, 0, 0
        self._bar: Row | None = None
        self._dull: set[str] = set()  # shapes of lines that tell nothing: noise is printed from few templates

    @property
    def style(self) -> str:
        """Return the style that is looked for; "" for every."""
        return self._style

    @style.setter
    def style(self, style: str) -> None:
        self._style = style
        self._mark = {"dict": "{", "verl": "step:"}.get(style, "")

    def told(self, lines: Iterable[tuple[int, str]]) -> Iterator[Told]:
        """Yield what the lines tell, whatever the style; once it is decided, lines of other styles are passed over."""
        nothing = True
        for count, line in lines:
            if nothing and self._line is None and count > _SILENT:
                self._source.say(f"no row in the first {_SILENT} lines: the rest is not looked at")
                return
            if not self._held and (self._mark not in line or not _TELLS.search(line)):
                continue
            for told in self.take(count, cleaned(line[:_LONGEST])):
                nothing = False
                yield told
        yield from self.rest()

    def take(self, count: int, line: str) -> Iterator[Told]:
        """Take the next line."""
        if self._held:
            opens = line.lstrip().startswith(("{'", '{"'))
            held = self._held
            if opens or "step:" in line or self._size + len(line) > _LONGEST_DICT:
                yield from self._given_up()
            else:
                self._hold(count, line)
                if self._braces > 0:
                    return
                text = "\n".join(part for _, part in held)
                found = dicts_in(text)
                if found.dicts:
                    self._held = []
                    yield from self._dicts(held[0][0], text, found)
                else:
                    yield from self._given_up()
                return
        yield from self._one(count, line, opening=True)

    def _hold(self, count: int, line: str) -> None:
        """Keep a line of a dict that goes on below."""
        self._held.append((count, line))
        self._size += len(line)
        self._braces += line.count("{") - line.count("}")

    def _given_up(self) -> Iterator[Told]:
        """Take what was held as lines of their own: it is no dict."""
        held, self._held = self._held, []
        for count, line in held:
            yield from self._one(count, line, opening=False)

    def _one(self, count: int, line: str, *, opening: bool) -> Iterator[Told]:
        """Take a line by itself; where it may open a dict that goes on below, it is held."""
        if "{" in line:
            found = dicts_in(line)
            if found.dicts:
                yield from self._flushed()
                yield from self._dicts(count, line, found)
            if opening and found.opened >= 0:
                self._size = self._braces = 0
                self._hold(count, line[found.end :])
                return
            if found.dicts:
                return
        shape = line.translate(_DIGITS) if len(line) <= _LONGEST_DULL else ""
        if shape in self._dull:
            return
        told = pairs_in(line)
        if told is None or not (told.style or told.step is not None):
            if shape and len(self._dull) < _MOST_DULL:  # what a line tells of, if not how much, lies in its shape
                self._dull.add(shape)
        elif told.style == "bar":
            yield from self._bars(count, told)
        else:
            yield from self._pairs(count, told)

    def rest(self) -> Iterator[Told]:
        """Tell what was open at the end."""
        yield from self._given_up()
        yield from self._flushed()
        if self._bar is not None:
            yield Told("bar", self._bar)

    def _dicts(self, count: int, text: str, found: Found) -> Iterator[Told]:
        at = 0
        for begins, record in found.dicts:
            before = text[at:begins]
            at = begins
            nulls = [key for key in MEASURED if key in self._seen and record.get(key, 0) is None]
            if nulls:
                record.update(dict.fromkeys(nulls, math.nan))
            row = row_of(record, self._source, self._run, f"line {count}")
            if row is None:
                continue
            self._seen.update(key for key in MEASURED if key in row.values)
            named = _NAMED.search(before[-80:]) if row.step is None else None
            if named and not _NO_STEP.search(named[1].strip()):
                row = row._replace(step=int(named[2]))
            elif row.step is None:
                row = row._replace(step=step_in(before[-200:]))
            yield Told("dict", row)

    def _bars(self, count: int, told: Line) -> Iterator[Told]:
        """Take a progress bar; it is drawn again and again, and what it showed last of a step counts."""
        row = row_of(told.values, self._source, self._run, f"line {count}")
        if row is None:
            return
        row = row._replace(step=told.step)
        before, self._bar = self._bar, row
        if before is not None and (before.values != row.values if row.step is None else before.step != row.step):
            yield Told("bar", before)

    def _pairs(self, count: int, told: Line) -> Iterator[Told]:
        if is_evaluation(told.values):
            return
        step = self._numbered(told)
        near = self._line is not None and count - self._at <= _FAR
        if told.step is None:
            if told.style != "table" and not any(map(_METRIC.search, told.values)):
                return  # noise below a row
            if not near and len(told.values) < 2 and told.style != "table":  # noqa: PLR2004
                return
            step = self._line.step if near and self._line is not None else None
        same = near and self._line is not None and (told.step is None or step == self._line.step)
        if same and self._values.keys().isdisjoint(told.values):
            self._values.update(told.values)
            self._at = count if told.style == "table" else self._at
            return
        if same and told.step is None and len(told.values) < 2 and told.style != "table":  # noqa: PLR2004
            return
        yield from self._flushed()
        self._line, self._values, self._at = told._replace(step=step), dict(told.values), count

    def _numbered(self, told: Line) -> int | None:
        """Return the step counted on over the epochs, where they begin anew to count."""
        if told.step is None:
            return None
        if told.epoch is not None and told.epoch != told.step:
            if told.epoch > self._epoch >= 0 and told.step <= self._raw:
                self._offset += self._total or self._raw + 1
            self._epoch = told.epoch
            self._raw, self._total = told.step, told.total
        return told.step + self._offset

    def _flushed(self) -> Iterator[Told]:
        line, values = self._line, self._values
        self._line, self._values = None, {}
        if line is None or not values:
            return
        if line.style != "verl" and not any(_METRIC.search(key) for key in values):
            return
        row = row_of(values, self._source, self._run, f"line {self._at}")
        if row is not None and (line.step is not None or row.step is not None or len(row.values) > 1):
            yield Told(line.style or "pairs", row._replace(step=row.step if line.step is None else line.step))
