"""Regroup: what was written value by value, each with its step, becomes rows again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from grpo_watchdog.logs.records import is_evaluation
from grpo_watchdog.logs.row import Row

_OPEN = 1 << 18  # values that are kept open for others of their steps, some 20 MB
_PASSING = frozenset(("epoch", "train/epoch"))  # written again with what is no row of training

Part = tuple[int, dict[str, float]]


class _Waiting(NamedTuple):
    """The rows that may still grow.

    Attributes:
        order: all of them, in the order in which their steps were met first.
        open: by step, the one that what comes next for this step joins.
    """

    order: deque[Part]
    open: dict[int, dict[str, float]]


def by_step(parts: Iterable[Part]) -> Iterator[Row]:
    """Yield the rows that parts of them make.

    What comes later for a step of the recent past joins its row, so that a file that was written key by key reads as
    one that was written step by step. A part with a key that its row has already begins another row of that step; where
    that step is an old one the run was taken up again from there, and no row from before is open any more. Where
    nothing but step 0 is there, and many times, the rows have no numbers.
    """
    waiting = _Waiting(deque(), {})
    held, numbered = 0, False
    for step, part in parts:
        numbered = numbered or step != 0
        held += _joined(waiting, step, part)
        while held > _OPEN:
            oldest, values = _closed(waiting)
            held -= len(values)
            yield from _row(oldest if numbered else None, values)
    numbered = numbered or len(waiting.order) == 1
    while waiting.order:
        oldest, values = _closed(waiting)
        yield from _row(oldest if numbered else None, values)


def _joined(waiting: _Waiting, step: int, part: dict[str, float]) -> int:
    """Put a part where it belongs and return how many values that added."""
    row = waiting.open.get(step)
    if row is None or not _PASSING.issuperset(row.keys() & part.keys()):
        if row is not None and step != waiting.order[-1][0]:
            waiting.open.clear()
        waiting.open[step] = part
        waiting.order.append((step, part))
        return len(part)
    before = len(row)
    row.update((key, value) for key, value in part.items() if key not in row)
    return len(row) - before


def _closed(waiting: _Waiting) -> Part:
    """Take out the oldest row."""
    step, values = waiting.order.popleft()
    if waiting.open.get(step) is values:
        del waiting.open[step]
    return step, values


def _row(step: int | None, values: dict[str, float]) -> Iterator[Row]:
    if not _PASSING.issuperset(values) and not is_evaluation(values):
        yield Row(step, values)
