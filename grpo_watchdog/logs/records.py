"""Records: what a reader has found, key and value, becomes rows; the same for every format.

The number of the step and the run go into their own fields; rows of evaluations and the summary at the end are left
out; what a trainer wrote of one step in several records becomes one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, pairwise

from grpo_watchdog.logs.flatten import LISTS, flat
from grpo_watchdog.logs.numbers import number, whole
from grpo_watchdog.logs.pivot import is_long, pivoted
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

Record = Mapping[str, object]

STEPS = (  # in the order of trust: W&B counts its own calls in _step, and a step may begin anew with each epoch
    "global_step", "step", "Step", "train/global_step", "training/global_step", "trainer/global_step", "_step",
    "train/step", "training/step", "trainer/step", "current_steps", "globalstep", "GlobalStep", "Global Step",
    "train_step", "training_step", "optimizer_step", "opt_step", "update", "Update", "update_step", "iteration",
    "Iteration", "iterations", "training_iteration", "iter", "Iter", "minibatch",
)  # fmt: skip
_PERHAPS = (  # where they count up
    "steps", "Steps", "global_steps", "optim_step", "policy_step", "num_steps", "step_id", "updates", "num_updates",
    "iters", "it", "rollout_step", "rollout_id", "rollout", "round", "batch", "time/iterations",
)  # fmt: skip
_ROUNDS = ("epoch", "Epoch")  # where each is one row
_COUNTED_OF = ("global_step/max_steps", "step/total_steps")  # "12/100", as ms-swift writes it
_RUNS = ("run", "run_id", "run_name", "Run", "experiment", "experiment_name", "exp", "exp_name", "trial", "trial_id")
_EVALUATIONS = (
    "val-core/", "val-aux/",
    *(f"{word}{mark}" for word in ("eval", "evaluation", "val", "valid", "validation", "test") for mark in "_/ "),
)  # fmt: skip
_NEUTRAL = frozenset(
    (*STEPS, *_PERHAPS, "epoch", "Epoch", "num_tokens", "total_tokens", "_runtime", "_timestamp", "timestamp", "time",
     "Wall time", "wall_time", "elapsed", "elapsed_time", "train/epoch")
)  # fmt: skip
_SUMMARY = ("train_runtime", "train/train_runtime")  # the line that transformers ends with
_SORTS = ("split", "phase", "mode", "stage", "type", "event", "kind", "subset", "set")  # of record
_NO_ROWS = re.compile(
    r"(?i)(eval|evaluate|evaluation|val|valid|validation|test|dev|summary|final|config|header|meta|metadata|"
    r"args|hparams|params|setup|start|begin|end|done|finished|checkpoint|system)$"
)
_FLAGS = ("eval", "is_eval", "evaluation", "is_validation", "validation")
_PASSING = ("_runtime", "_timestamp", "timestamp", "time", "wall_time", "elapsed", "elapsed_time")  # may differ
_CONTAINERS = ("metrics", "metric", "logs", "log", "data", "values", "scalars", "stats", "info")
_PEEK = 16


def rows_of(records: Iterable[tuple[str, Record]], source: Source, run: str = "") -> Iterator[Row]:
    """Yield the rows that records make.

    Args:
        records: the place and the content of each, in the order of the log.
        source: takes the notices.
        run: which of several runs they are.
    """
    given = iter(records)
    first = list(islice(given, _PEEK))
    given = chain(first, given)
    if first and is_long(record for _, record in first):
        yield from pivoted(given, source, run, _RUNS)
        return
    steps = _counting([record for _, record in first])
    made = (row_of(record, source, run, place, steps) for place, record in given)
    yield from merged(row for row in made if row is not None)


def row_of(
    record: Record, source: Source, run: str = "", place: str = "", steps: tuple[str, ...] = STEPS
) -> Row | None:
    """Return the row that one record makes, or None where it is no row of training.

    Args:
        record: what was logged.
        source: takes the notices.
        run: which of several runs it is of, where the format says so.
        place: where it stands.
        steps: the keys that number the rows.
    """
    if _no_row(record):
        return None
    values, lists = flat(record)
    if lists:
        source.say(LISTS)
    if is_evaluation(values) or any(key in values for key in _SUMMARY):
        return None
    step = _taken(values, record, steps)
    if any(name in record for name in _CONTAINERS):
        values = _unwrapped(values)
    if not values:
        return None
    return Row(step, values, run or _run(record), place)


def merged(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows, those that stand together and tell different things of one step as one."""
    last: Row | None = None
    for row in rows:
        if last is not None and row.step is not None and row[0] == last.step and row.run == last.run:
            if row.values == last.values:
                continue  # said twice
            both = _both(last.values, row.values)
            if both is not None:
                last = last._replace(values=both)
                continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _both(old: dict[str, float], new: dict[str, float]) -> dict[str, float] | None:
    """Return two parts of a row in one, or None where they contradict or the second adds nothing."""
    shared = old.keys() & new.keys()
    if len(shared) == len(new) or any(old[key] != new[key] and key not in _PASSING for key in shared):
        return None
    return {**old, **new}


def _counting(first: list[Record]) -> tuple[str, ...]:
    """Return the keys that number these rows: the usual names, else one that counts up, else an epoch that is a row."""
    if any(key in record for record in first for key in (*STEPS, *_COUNTED_OF)):
        return STEPS
    for key in (*_PERHAPS, *_ROUNDS):
        counts = [whole(number(record.get(key))) for record in first]
        known = [count for count in counts if count is not None]
        rises = [b - a for a, b in pairwise(known)]
        if len(known) == len(first) and rises and min(rises) > 0 and (key in _PERHAPS or max(rises) == 1):
            return (key,)
    return STEPS


def _taken(values: dict[str, float], record: Record, steps: tuple[str, ...]) -> int | None:
    """Take the step out of the values."""
    for key in steps:
        if key in values:
            step = whole(values[key])
            if step is not None:
                del values[key]
                return step
    for key in _COUNTED_OF:
        text = record.get(key)
        if isinstance(text, str) and text.partition("/")[0].strip().isdecimal():
            return int(text.partition("/")[0][:16])
    return None


def _unwrapped(values: dict[str, float]) -> dict[str, float]:
    """Return the values without a container that holds all but a few of them: {"step": 1, "metrics": {...}}."""
    for name in _CONTAINERS:
        prefix = f"{name}/"
        inside = [key for key in values if key.startswith(prefix)]
        if inside and all(key.startswith(prefix) or key in _NEUTRAL for key in values):
            return {key.removeprefix(prefix): value for key, value in values.items()}
    return values


def _run(record: Record) -> str:
    for key in _RUNS:
        name = record.get(key)
        if isinstance(name, str) and name:
            return name[:200]
    return ""


def _no_row(record: Record) -> bool:
    for key in _SORTS:
        sort = record.get(key)
        if isinstance(sort, str) and _NO_ROWS.match(sort):
            return True
    return any(record.get(key) is True or record.get(key) in ("True", "true") for key in _FLAGS)


def is_evaluation(values: Mapping[str, float]) -> bool:
    """Return whether there is nothing but an evaluation in it."""
    any_evaluation = False
    for key in values:
        if key.lower().startswith(_EVALUATIONS):
            any_evaluation = True
        elif key not in _NEUTRAL:
            return False
    return any_evaluation
