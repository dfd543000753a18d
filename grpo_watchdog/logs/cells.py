"""Cells: how the lines of a table are cut, and the lines cut so."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import NamedTuple

from grpo_watchdog.logs.numbers import text_number
from grpo_watchdog.logs.records import STEPS
from grpo_watchdog.logs.source import Source

_SEPARATORS = (",", ";", "\t", "|", " ")  # " ": set with blanks, as pandas prints and people paste
_ENDS = re.compile(r"\r\n|\r|\n")
_BLANKS = re.compile(r"\s{2,}|\t")
_RULE = re.compile(r"[\s|+:=_-]+")
_ABSENT = frozenset(("", "no log", "none", "null", "-", "n/a", "na", "<na>"))
_COMMA = re.compile(r"[-+]?\d+,\d+(?:[eE][-+]?\d+)?")
_LOOKED_AT = 40  # lines before the heading
_BELOW = 3  # lines under it that have to fit
_LONGEST = 1 << 20  # characters of a line that are cut into cells
_LONGEST_NAME = 300
_MOST_LINES = 10_000  # of one record: text over more is an open quotation mark


class Layout(NamedTuple):
    """How a table is set.

    Attributes:
        separator: what stands between two cells.
        skipped: the number of the line of the heading, from the first line that is not blank.
        heading: the names.
    """

    separator: str
    skipped: int
    heading: list[str]

    def value(self, cell: str) -> float | None:
        """Return the number in a cell, which may have a decimal comma."""
        found = text_number(cell)
        if found is None and self.separator != "," and _COMMA.fullmatch(cell.strip()):
            return float(cell.replace(",", "."))
        return found


class _TooLong(Exception):  # noqa: N818 - never leaves this file
    """One record takes more lines than a record can."""


class _Lines:
    """The lines under a heading, as csv.reader asks for them; it goes on after it raised."""

    def __init__(self, source: Source, layout: Layout) -> None:
        self._lines, self._skipped = source.lines(), layout.skipped
        self._blank = True  # the blank lines before the first are not counted
        self._counted = self.asked = self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        for number, line in self._lines:
            self._blank = self._blank and not line.strip("\ufeff \t\r\n")
            self._counted += not self._blank
            if self._counted > self._skipped and line.strip():
                self.number = number
                self.asked += 1
                if self.asked > _MOST_LINES:
                    raise _TooLong
                return line[:_LONGEST].replace("\0", "") + "\n"
        raise StopIteration


def absent(cell: str) -> bool:
    """Return whether a cell says that there is nothing in it."""
    return cell.strip().lower() in _ABSENT


def layout_of(head: str) -> Layout | None:
    """Return how the table at the beginning of a log is set, or None where there is none."""
    lines = _ENDS.split(head)
    for at, line in enumerate(lines[:_LOOKED_AT]):
        if not line.strip() or line.lstrip().startswith("#") or _RULE.fullmatch(line):
            continue
        below = lines[at + 1 :]
        for separator in _SEPARATORS:
            layout = Layout(separator, at + 1, cut(line, separator))
            if len(layout.heading) > (separator != ",") and _fits(layout, _under(below, separator)):
                return layout
    return None


def _under(lines: list[str], separator: str) -> list[list[str]]:
    """Return the cells of the first records of a table."""
    if separator in " |":
        near = takewhile(str.strip, lines[: 2 * _BELOW])
        return [cut(line, separator) for line in near if not _RULE.fullmatch(line)][:_BELOW]
    text = (f"{line}\n" for line in lines if line.strip() and not _RULE.fullmatch(line))
    try:
        return list(islice(csv.reader(text, delimiter=separator), _BELOW))
    except csv.Error:
        return []


def _fits(layout: Layout, below: list[list[str]]) -> bool:
    """Return whether a heading names the numbers that stand under it."""
    heading, loose = layout.heading, layout.separator in " |"
    names = [name for name in heading if name]
    if not below or len(names) + 1 < len(heading) or any(_no_name(name, loose=loose) for name in names):
        return False
    if len(names) < 2 and (loose or not names or not names[0].isidentifier()):  # noqa: PLR2004
        return False
    first = below[0]
    extra = len(first) - len(heading)  # pandas prints an index before its columns
    if extra not in ((0, 1) if layout.separator == " " else (0,)):
        return False
    if loose and (len(set(names)) < len(names) or any(len(cells) != len(first) for cells in below[:2])):
        return False
    cells = first[extra:]
    numbers = [layout.value(cell) for cell in cells]
    stepped = any(found is not None and name in STEPS for name, found in zip(heading, numbers, strict=True))
    known = sum(found is not None or absent(cell) for found, cell in zip(numbers, cells, strict=True))
    return any(found is not None for found in numbers) and (stepped or known * 2 >= len(cells))


def _no_name(name: str, *, loose: bool) -> bool:
    return len(name) > _LONGEST_NAME or text_number(name) is not None or (loose and name[-1] in ":=")


def cut(line: str, separator: str) -> list[str]:
    """Return the cells of one line."""
    line = line.strip(" ") if separator == "\t" else line.strip()
    if separator == " ":
        return _BLANKS.split(line) if _BLANKS.search(line) else line.split()
    if separator == "|":
        return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def cells_in(source: Source, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line under the heading, and its cells; quoted text over several lines is one cell."""
    lines = _Lines(source, layout)
    if layout.separator in " |":
        for line in lines:
            lines.asked = 0
            if not _RULE.fullmatch(line):
                yield lines.number, cut(line, layout.separator)
        return
    reader, broken, first = csv.reader(lines, delimiter=layout.separator), 0, 0
    while True:
        lines.asked = 0
        try:
            cells = next(reader)
        except StopIteration:
            break
        except (csv.Error, _TooLong):
            broken += 1
            first = first or lines.number
            continue
        yield lines.number, cells
    if broken:
        source.say(f"lines that cannot be cut into cells and are left out: {broken}; the first is line {first}")
