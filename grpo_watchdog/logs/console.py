"""Console logs: what a trainer printed, in the style that it prints its metrics in, with noise between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from grpo_watchdog.logs.json_text import beginning
from grpo_watchdog.logs.records import merged
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source
from grpo_watchdog.logs.told import Teller, Told

NAME = "console"
_FIRST, _FIRST_SURE = 20_000, 50  # rows after which the style is decided; of a style that nothing else looks like
_SURE = ("dict", "verl")
_FEW = 3  # rows are too few to tell what comes again; keys are enough to be one of them
_WEIGHT = {"dict": 4, "verl": 4, "pairs": 2, "table": 2, "bar": 1}
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CONTROL = 0.1  # of the characters: then it is no text


def recognises(source: Source) -> bool:
    """Return whether it is text."""
    head = beginning(source)
    if source.head.startswith(_PICKLE):
        return False
    odd = sum(1 for letter in head if letter == "\ufffd" or (letter < " " and letter not in "\t\r\n\x1b\0\x08"))
    return bool(head) and odd <= _CONTROL * len(head) and head.count("\0") <= _CONTROL * len(head)


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows."""
    return rows_in(source.lines(), source)


def rows_in(lines: Iterable[tuple[int, str]], source: Source, run: str = "") -> Iterator[Row]:
    """Yield the rows that stand in lines of text, of the one style that tells most; rows of other kinds are noise."""
    teller = Teller(source, run)
    told = teller.told(lines)
    first, sure = list[Told](), 0
    for entry in told:
        first.append(entry)
        sure += entry.style in _SURE
        if sure >= _FIRST_SURE or len(first) >= _FIRST:
            break
    teller.style = _style(first)
    yield from merged(_usual(first, told, teller.style))


def _style(first: list[Told]) -> str:
    score = Counter[str]()
    for style, row in first:
        score[style] += _WEIGHT[style] * len(row.values)
    return score.most_common(1)[0][0] if score else ""


def _usual(first: list[Told], told: Iterator[Told], style: str) -> Iterator[Row]:
    """Yield the rows of a style whose keys come again: a setting that was printed in the same way comes once."""
    mine = [entry.row for entry in first if entry.style == style]
    known = Counter(key for row in mine for key in row.values)
    often = {key for key, count in known.items() if count > 1 or len(mine) < _FEW}
    for row in mine:
        shared = sum(key in often for key in row.values)
        if shared * 2 >= len(row.values) or shared >= _FEW:
            yield row
    for entry in told:
        if entry.style == style and not often.isdisjoint(entry.row.values):
            often.update(entry.row.values)
            yield entry.row
