"""Tables: where in a JSON document the rows stand, and in which of the shapes that people and pandas write."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from types import NoneType
from typing import NamedTuple

from grpo_watchdog.logs.numbers import number
from grpo_watchdog.logs.records import STEPS

_DEEPEST = 32
_MOST_LOOKED_AT = 100_000  # objects in one document
_COUNTED = re.compile(r"(?i)(?:(?:global[_ -]?)?step|iter(?:ation)?|update|epoch)?[_ -]?(\d{1,15})$")
_EVALUATION = re.compile(r"(?i)(?:^|[_/ -])(?:eval|evaluation|val|valid|validation|test)(?:$|[_/ -])")
MOST_ROWS = 1_000_000  # of one table in one document
_ALIKE = 0.5  # of the keys of two lists: then they are two runs of one kind
_PAIR, _TRIPLE = 2, 3

Record = Mapping[str, object]


class Table(NamedTuple):
    """Rows in a document.

    Attributes:
        path: the keys that lead to it.
        records: its rows.
        run: which of several runs it is; "" where there is one.
    """

    path: tuple[str, ...]
    records: list[Record]
    run: str = ""

    @property
    def keys(self) -> set[str]:
        """Return the keys of its first rows."""
        return {key for record in self.records[:8] for key in record}


def tables(document: object, name: str) -> list[Table]:
    """Return the longest table in a document, or several where they are runs of one kind.

    Args:
        document: what JSON gave.
        name: what a list of bare numbers is called.
    """
    found = [table for table in _found(document, name) if table.records]
    training = [table for table in found if not any(map(_EVALUATION.search, table.path))] or found
    if not training:
        return []
    best = max(training, key=lambda table: (len(table.keys) > 1, len(table.records)))
    for at in range(len(best.path)):
        beside = [table for table in training if _alike(table, best, at)]
        if len(beside) > 1:
            return [table._replace(run=table.path[at]) for table in beside]
    return [best]


def _alike(one: Table, other: Table, at: int) -> bool:
    """Return whether two tables stand at places that differ in one key only, and measure alike."""
    if len(one.path) != len(other.path) or one.path[:at] + one.path[at + 1 :] != other.path[:at] + other.path[at + 1 :]:
        return False
    keys, others = one.keys, other.keys
    return len(one.records) > 1 and len(keys & others) >= _ALIKE * len(keys | others)


def _found(document: object, name: str) -> Iterator[Table]:
    waiting = deque[tuple[tuple[str, ...], object]]([((), document)])
    looked_at = 0
    while waiting and looked_at < _MOST_LOOKED_AT:
        looked_at += 1
        path, value = waiting.popleft()
        records = _records(value, path[-1] if path else name)
        if records is not None:
            yield Table(path, records)
        elif isinstance(value, dict) and len(path) < _DEEPEST:
            waiting.extend(((*path, str(key)), inner) for key, inner in islice(value.items(), _MOST_LOOKED_AT))
        elif isinstance(value, list) and not path:
            waiting.extend(((_called(inner, count),), inner) for count, inner in enumerate(value[:1000], 1))


def _called(value: object, count: int) -> str:
    names = [value.get(key) for key in ("run", "run_name", "name", "id")] if isinstance(value, dict) else []
    return next((name for name in names if isinstance(name, str) and name), str(count))


def _records(value: object, name: str) -> list[Record] | None:
    """Return the rows that a value is, or None where it is no table itself."""
    if isinstance(value, list):
        return _listed(value, name)
    if not isinstance(value, dict) or not value:
        return None
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list):
        return [dict(zip(map(str, columns), row, strict=False)) for row in data if isinstance(row, list)]
    return _columnar(value) or _indexed(value)


def _listed(value: list[object], name: str) -> list[Record] | None:
    kinds = set(map(type, value))  # of millions of items at once
    if dict in kinds:
        records: list[Record] = [item for item in value if isinstance(item, dict)]
        if len(records) * 2 < len(value) or _holders(records):
            return None
        return records if any(_measures(record) for record in records[:100]) else None
    if kinds != {list}:
        return None
    pairs = [item for item in value if isinstance(item, list) and len(item) in (_PAIR, _TRIPLE)]
    if len(pairs) == len(value) and all(number(part) is not None for part in pairs[0]):
        return [{"step": item[-2], name: item[-1]} for item in pairs]  # as TensorBoard hands a curve out
    return None


def _holders(records: list[Record]) -> bool:
    """Return whether they are runs that each hold their rows, rather than rows."""
    names = ("log_history", "history", "logs", "rows", "steps", "metrics")
    return all(any(isinstance(record.get(n), list) and _a_list_of_rows(record[n]) for n in names) for record in records)


def _a_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value)


def _measures(record: Mapping[str, object], depth: int = 0) -> bool:
    return any(
        number(value) is not None
        or (isinstance(value, dict) and depth < _DEEPEST and _measures(value, depth + 1))
        or (isinstance(value, list) and bool(value) and number(value[0]) is not None)
        for value in record.values()
    )


def _columnar(value: Mapping[str, object]) -> list[Record] | None:
    """Return the rows of {"loss": [..], "reward": [..]}, of the columns of the length that most have."""
    columns = {key: column for key, column in value.items() if isinstance(column, list) and _numeric(column)}
    lengths = [len(column) for column in columns.values()]
    if not lengths or max(lengths) < _PAIR:
        return None
    scalars = [key for key, inner in value.items() if not isinstance(inner, list) and number(inner) is not None]
    if len(scalars) > len(columns) or any(key in STEPS for key in scalars):
        return None  # a row that holds some lists
    length = max(set(lengths), key=lambda size: (lengths.count(size) * (size > 1), size))
    whole = {key: column for key, column in columns.items() if len(column) == length}
    rows = islice(zip(*whole.values(), strict=True), MOST_ROWS)
    return [dict(zip(whole, cells, strict=True)) for cells in rows]


def _numeric(column: list[object]) -> bool:
    kinds = set(map(type, column))  # of millions of cells at once
    if not kinds <= {int, float, str, NoneType}:
        return False
    return not kinds.isdisjoint((int, float)) or any(number(cell) is not None for cell in column[:_MOST_LOOKED_AT])


def _indexed(value: Mapping[str, object]) -> list[Record] | None:
    """Return the rows of {"10": {..}, "20": {..}} or, as pandas writes columns, of {"loss": {"0": ..}}."""
    inner = {key: item for key, item in value.items() if isinstance(item, dict)}
    if len(inner) < len(value) or not inner:
        return None
    counts = [_COUNTED.match(key) for key in inner]
    if all(counts):
        numbered = [int(count[1]) for count in counts if count]
        from_zero = numbered == list(range(len(numbered)))
        rows = [{"step": step, **item} for step, item in zip(numbered, inner.values(), strict=True)]
        return list(inner.values()) if from_zero else sorted(rows, key=lambda row: float(number(row["step"]) or 0.0))
    cells = [key for column in inner.values() for key in list(column)[:4]]
    if not cells or not all(key.isdecimal() for key in cells):
        return None
    index = dict.fromkeys(key for column in inner.values() for key in column)
    return [{name: column[key] for name, column in inner.items() if key in column} for key in index]
