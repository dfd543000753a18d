"""Pivot: a log with one number a record (step, name, value) as rows with all the numbers of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from grpo_watchdog.logs.numbers import number, whole
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

_NAMES = ("tag", "metric", "name", "key", "metric_name", "variable", "scalar")
_VALUES = ("value", "Value", "val", "metric_value", "scalar_value")
_STEPS = ("step", "Step", "global_step", "iteration", "iter", "update", "epoch")
_EVALUATIONS = ("eval/", "eval_", "val/", "validation/", "test/")
_MOST = 20_000_000  # numbers that are kept, for a step's may stand anywhere in the file

Record = Mapping[str, object]


def is_long(first: Iterable[Record]) -> bool:
    """Return whether records hold one named number each."""
    kinds = [_columns(record) for record in first]
    return bool(kinds) and None not in kinds


def _columns(record: Record) -> tuple[str, str, str] | None:
    name = next((key for key in _NAMES if isinstance(record.get(key), str)), None)
    value = next((key for key in _VALUES if key in record), None)
    step = next((key for key in _STEPS if key in record), None)
    named = name is not None and number(record[name]) is None
    return (name, value, step) if name and named and value and step else None


def pivoted(records: Iterable[tuple[str, Record]], source: Source, run: str, run_keys: Iterable[str]) -> Iterator[Row]:
    """Yield one row a step and run, runs in the order of their first record, steps in rising order.

    Raises:
        LogError: there is more than can be kept.
    """
    names = tuple(run_keys)
    runs: dict[str, dict[int, dict[str, float]]] = {}
    kept = repeated = 0
    for place, record in records:
        columns = _columns(record)
        if columns is None:
            continue
        step, value = whole(number(record[columns[2]])), number(record[columns[1]])
        key = str(record[columns[0]])
        if step is None or value is None or key.startswith(_EVALUATIONS):
            continue
        kept += 1
        if kept > _MOST:
            raise source.error(place, f"more than {_MOST} numbers, one a line; write them as one row a step")
        mine = run or next((str(record[n]) for n in names if isinstance(record.get(n), str)), "")
        cell = runs.setdefault(mine, {}).setdefault(step, {})
        repeated += key in cell
        cell[key] = value
    if repeated:
        source.say(f"{repeated} numbers stand twice for their step: the last one counts")
    for name, steps in runs.items():
        for step in sorted(steps):
            yield Row(step, steps[step], name)
