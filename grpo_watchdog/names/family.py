"""Family: what the keys of one trainer's logs mean, and how a row of them becomes canonical metrics.

A key that no table has is unknown: it is listed, and nothing is made of it. The tables are data; this file is all that
reads them, once for every set of keys that a log's rows have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from grpo_watchdog.metrics import RatioTo

_MOST_KEYS, _MOST_PLANS = 20_000, 512  # remembered; a log that has more is read anew, only slower
_LONGEST = 200  # characters; what is longer is no trainer's key, and patterns would take long over it


class Key(NamedTuple):
    """What one key of a log means.

    Attributes:
        key: as the trainer writes it; `*` stands for a name from the user, that of a reward function.
        means: what it is, in a line.
        pair: "current/reference", "current/old", "trainer/sampler", or "" where no policies are compared.
        estimator: how the comparison is estimated, and what is clamped.
        reduction: over what it is reduced, and how, before the log averages it.
        canonical: the canonical metric that it is; None where it is none of them.
        when: under which settings, or in which rows, it is missing.
        only: the settings under which it is that metric; "" for all.
        factor: the canonical metric is this times what is logged.
        clamped: between which values what is averaged is clamped before it is logged: a limit beyond is never reached.
        also: a further canonical metric that it is, in a narrower unit.
        beside: a key (or pattern) that must stand in the same row for this to hold; "" for none.
        without: a key (or pattern) that must not stand in the same row for this to hold; "" for none.
        join: how several keys of one row that match become one value; "first" takes the first alone.
    """

    key: str
    means: str
    pair: str = ""
    estimator: str = ""
    reduction: str = ""
    canonical: str | None = None
    when: str = ""
    only: str = ""
    factor: float = 1.0
    clamped: tuple[float, float] | None = None
    also: str = ""
    beside: str = ""
    without: str = ""
    join: Literal["first", "largest", "mean"] = "first"


class _Plan(NamedTuple):
    """How the rows of one set of keys are read: what is taken as it is, what is scaled, what is joined."""

    taken: tuple[tuple[str, str], ...]
    scaled: tuple[tuple[str, str, float], ...]
    joined: tuple[tuple[str, str, tuple[str, ...]], ...]


class Family:
    """The names of one family of trainers.

    Args:
        name: as `--trainer` takes it.
        title: as a report calls it.
        keys: the table; of two keys for one metric the earlier is trusted more.
        marks: keys or patterns that speak for this family; "a & b" where both must be there. One that begins with "!"
            outweighs all that do not.
        ratio_to: which policy its surrogate ratio is taken to.
        prefixes: beginnings that its loggers put before a key.
        notes: what holds for all of its keys.
        last: the table that is asked about keys which this one lacks.
    """

    def __init__(
        self,
        name: str,
        title: str,
        keys: Iterable[Key],
        *,
        marks: Iterable[str] = (),
        ratio_to: RatioTo = "old",
        prefixes: tuple[str, ...] = (),
        notes: str = "",
        last: Family | None = None,
    ) -> None:
        """Keep the table; nothing is read yet."""
        self.name, self.title, self.keys, self.notes = name, title, tuple(keys), notes
        self.marks, self.ratio_to = tuple(marks), ratio_to
        self.prefixes, self.last = prefixes, last
        self._exact: dict[str, list[tuple[int, Key]]] = {}
        self._patterns: list[tuple[int, Key]] = []
        for rank, key in enumerate(self.keys):
            if "*" in key.key:
                self._patterns.append((rank, key))
            else:
                self._exact.setdefault(key.key, []).append((rank, key))
        self._found: dict[str, list[tuple[int, Key]]] = {}
        self._plans: dict[tuple[str, ...], _Plan] = {}

    def __repr__(self) -> str:
        return f"Family({self.name})"

    def canonical(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the canonical metrics of a row of a log; what no table knows is left out."""
        names = tuple(values)
        plan = self._plans.get(names)
        if plan is None:
            plan = self._planned(names)
        row = {metric: values[key] for metric, key in plan.taken}
        for metric, key, factor in plan.scaled:
            row[metric] = values[key] * factor
        for metric, how, keys in plan.joined:
            row[metric] = _joined([values[key] for key in keys], how)
        return row

    def unknown(self, keys: Iterable[str]) -> list[str]:
        """Return the keys of which nothing is known, in the order given."""
        return [key for key in keys if not self.lines(key)]

    def meaning(self, key: str, row: Iterable[str] = ()) -> Key | None:
        """Return what a key means in a row of these keys, or None where no table has it."""
        beside = {self.spelt(other) for other in (*row, key)}
        return next((line for _, line in self.lines(key) if _holds(line, beside)), None)

    def spelt(self, key: str) -> str:
        """Return a key as the table spells it: without what loggers put before it."""
        for prefix in self.prefixes:
            if key.startswith(prefix) and len(key) > len(prefix):
                return key[len(prefix) :]
        return key

    def lines(self, key: str) -> list[tuple[int, Key]]:
        """Return the lines of the tables that a key may be, the more trusted first; none where it is unknown."""
        found = self._found.get(key)
        if found is None:
            found = list(self._own(key)) if len(key) <= _LONGEST else []
            if not found and self.last is not None:
                found = [(rank + len(self.keys), line) for rank, line in self.last.lines(key)]
            if len(self._found) >= _MOST_KEYS:
                self._found.clear()
            self._found[key] = found
        return found

    def _own(self, key: str) -> list[tuple[int, Key]]:
        """Return the lines of this table that a key may be."""
        return self._at(key) or self._at(self.spelt(key))

    def _at(self, name: str) -> list[tuple[int, Key]]:
        return self._exact.get(name) or [(rank, line) for rank, line in self._patterns if fnmatchcase(name, line.key)]

    def _planned(self, names: tuple[str, ...]) -> _Plan:
        beside = {self.spelt(name) for name in names}
        best: dict[str, tuple[int, Key, list[str]]] = {}
        for name in names:
            line = next(((rank, line) for rank, line in self.lines(name) if _holds(line, beside)), None)
            if line is None:
                continue
            rank, key = line
            for metric in filter(None, (key.canonical, key.also)):
                other = best.get(metric)
                if other is None or rank < other[0]:
                    best[metric] = (rank, key, [name])
                elif rank == other[0] and key.join != "first":
                    other[2].append(name)
        taken, scaled, joined = [], [], []
        for metric, (_, key, given) in best.items():
            if key.join != "first":
                joined.append((metric, key.join, tuple(given)))
            elif key.factor != 1.0:
                scaled.append((metric, given[0], key.factor))
            else:
                taken.append((metric, given[0]))
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[names] = _Plan(tuple(taken), tuple(scaled), tuple(joined))
        return plan


def _holds(line: Key, beside: set[str]) -> bool:
    return (not line.beside or _stands(line.beside, beside)) and not (line.without and _stands(line.without, beside))


def _stands(name: str, beside: set[str]) -> bool:
    return name in beside or ("*" in name and any(fnmatchcase(key, name) for key in beside))


def _joined(values: list[float], how: str) -> float:
    if any(map(math.isnan, values)):
        return math.nan
    if how == "mean":
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values)
    return max(values, key=abs)
