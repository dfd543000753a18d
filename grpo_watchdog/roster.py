"""Roster: which rules look at a step; the others sleep, and learn afterwards what they slept through.

Nothing depends on who sleeps: findings and state are those of every rule looking at every step, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter, le
from typing import Any

from grpo_watchdog.detectors.detector import CALM
from grpo_watchdog.detectors.sleep import NAP, Interval, Sleeper
from grpo_watchdog.watch import Watch


class _Bed:
    """One rule that may sleep, and its columns in a row."""

    __slots__ = ("asleep", "columns", "learns", "watch")

    def __init__(self, watch: Watch, learns: Sleeper | None, columns: slice) -> None:
        self.watch, self.learns, self.columns = watch, learns, columns
        self.asleep = False


class Roster:
    """Shows each step to those whom it may concern.

    Args:
        watches: every rule's.
    """

    def __init__(self, watches: Sequence[Watch]) -> None:
        """Start with everybody awake."""
        self._watches = watches
        self._order: tuple[str, ...] | None = None  # the metrics given, as they came
        self._given: Collection[str] = ()
        self._unseeing: list[Watch] = []  # their metrics are not given, and they do not fire
        self._missed = 0  # observations that these have not counted yet
        self._always: list[Watch] = []
        self._looking: list[Watch] = []  # these, and those that could sleep but stay up for now
        self._restless: list[_Bed] = []  # without a memory, and up until a look puts them to sleep again
        self._beds: list[_Bed] = []
        self._rows: list[tuple[float, ...]] = []  # what those asleep have still to learn
        # By column: the interval within which nothing comes of a value, and whose it is.
        self._lows, self._highs, self._whose = list[float](), list[float](), list[_Bed]()
        self._row: Callable[[Mapping[str, float]], tuple[float, ...]] = _nothing

    def look(self, values: Mapping[str, float], step: int) -> bool:
        """Show one step; return whether findings changed in rank, or are above a notice."""
        if tuple(values) != self._order:
            self._regroup(values)
        dirty = False
        for watch in self._looking:
            if watch.calm:
                reading = watch.read(values, firing=False)
                if reading is not CALM:
                    dirty |= watch.take(reading, step) or watch.loud
            else:
                dirty |= watch.update(values, step) or watch.loud
        if self._restless:
            dirty |= self._toss(values, step)
        row = self._row(values)
        if not (all(map(le, self._lows, row)) and all(map(le, row, self._highs))):
            dirty |= self._wake(row, values, step)
        self._rows.append(row)
        self._missed += 1
        if len(self._rows) >= NAP:
            self._lie_down()
        return dirty

    def catch_up(self) -> None:
        """Bring everybody's memory up to date."""
        self._lie_down()
        for watch in self._unseeing:
            watch.miss(self._missed)
        self._missed = 0

    def _regroup(self, values: Mapping[str, float]) -> None:
        """Tell apart those that can see by what is given now."""
        self._order = tuple(values)
        if values.keys() == self._given:
            return
        self.catch_up()
        self._given = frozenset(values)
        self._unseeing, self._always, self._beds = [], [], []
        names, whose = list[str](), list[_Bed]()
        for watch in self._watches:
            able = watch.able(values)
            columns = watch.columns(values) if able else ()
            if columns:
                bed = _Bed(watch, watch.sleeper, slice(len(names), len(names) + len(columns)))
                self._beds.append(bed)
                names += columns
                whose += [bed] * len(columns)
            else:
                (self._always if able or watch.active else self._unseeing).append(watch)
        self._whose = whose
        self._lows, self._highs = [math.inf] * len(names), [-math.inf] * len(names)
        self._row = _getter(names)
        self._looking, self._restless = list(self._always), []
        for bed in self._beds:
            self._put(bed, bed.watch.sleep())

    def _wake(self, row: tuple[float, ...], values: Mapping[str, float], step: int) -> bool:
        """Have those look whom a value concerns; return what `look` does."""
        dirty, last = False, None
        for low, value, high, bed in zip(self._lows, row, self._highs, self._whose, strict=True):
            if low <= value <= high or bed is last or not bed.asleep:
                continue
            last, watch = bed, bed.watch
            self._teach(bed, list(zip(*self._rows, strict=True)))
            dirty |= watch.take(watch.read(values, firing=watch.held > 0), step) or watch.loud
            # One that has much to remember stays up until all are put to bed: what woke it will often do so again.
            self._put(bed, watch.sleep() if bed.learns is None else None)
        return dirty

    def _toss(self, values: Mapping[str, float], step: int) -> bool:
        """Have the restless look, and put to sleep those that may; return what `look` does."""
        dirty, beds = False, self._restless
        self._restless = []
        for bed in beds:
            watch = bed.watch
            dirty |= watch.take(watch.read(values, firing=watch.held > 0), step) or watch.loud
            self._put(bed, watch.sleep())
        return dirty

    def _teach(self, bed: _Bed, columns: Sequence[tuple[float, ...]]) -> None:
        if bed.asleep and bed.learns is not None and columns:
            bed.learns.catch_up(columns[bed.columns])

    def _lie_down(self) -> None:
        """Teach everybody what was slept through; put to sleep whom the next values may not concern."""
        self._looking = list(self._always)
        columns = list(zip(*self._rows, strict=True))
        for bed in self._beds:
            if bed.learns is not None:
                self._teach(bed, columns)
                self._put(bed, bed.watch.sleep())
        self._rows.clear()

    def _put(self, bed: _Bed, intervals: tuple[Interval, ...] | None) -> None:
        """Let one sleep while its columns lie within these; None, and an interval that is none, keep it awake."""
        columns = range(bed.columns.start, bed.columns.stop)
        if intervals is None or intervals[0][0] > intervals[0][1]:
            bed.asleep = False
            if bed.learns is None:
                self._restless.append(bed)
            else:
                self._looking.append(bed.watch)
            for column in columns:
                self._lows[column], self._highs[column] = -math.inf, math.inf
            return
        bed.asleep = True
        for column, (low, high) in zip(columns, intervals, strict=False):
            self._lows[column], self._highs[column] = low, high


def _nothing(values: Mapping[str, float]) -> tuple[float, ...]:  # noqa: ARG001
    return ()


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, float]], tuple[float, ...]]:
    """Return what takes the values of these metrics, in this order, out of a step."""
    if not names:
        return _nothing
    if len(names) == 1:
        name = names[0]
        return lambda values: (values[name],)
    found: Callable[[Any], tuple[float, ...]] = itemgetter(*names)
    return found
