"""trainer_state.json of transformers: the rows stand in `log_history`, alone or beside other things."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from grpo_watchdog.logs.json_text import beginning, documents
from grpo_watchdog.logs.numbers import number
from grpo_watchdog.logs.records import Record, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "trainer_state"
_KEY = "log_history"
_HERE = re.compile(rf'"{_KEY}"\s*:\s*\[')
MEASURED = ("loss", "grad_norm", "kl", "reward", "reward_std", "entropy")  # null there was not-a-number
_DEEPEST = 8


def recognises(source: Source) -> bool:
    """Return whether it is a JSON object with a `log_history`."""
    head = beginning(source)
    return head.startswith("{") and _HERE.search(head) is not None


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of training.

    Raises:
        LogError: it is not JSON.
    """
    for document in documents(source):
        history = document if isinstance(document, list) else _history(document, 0)
        yield from rows_of(measured(history or [], source), source)


def measured(history: Sequence[object], source: Source) -> Iterator[tuple[str, Record]]:
    """Yield the records of a history, null read as not-a-number where the key holds numbers in other rows.

    TRL writes null where every value of a row was not-a-number; transformers writes it where it measured nothing.
    """
    records = [record for record in history if isinstance(record, dict)]
    sometimes = {key for key in MEASURED if any(number(record.get(key)) is not None for record in records)}
    for count, record in enumerate(records, 1):
        nulls = [key for key, value in record.items() if value is None]
        if nulls and sometimes.issuperset(nulls):  # where there are others, a table was written with its empty cells
            source.say(f"null in {', '.join(nulls)} is read as not-a-number: other rows hold numbers there")
            yield f"row {count}", {**record, **dict.fromkeys(nulls, math.nan)}
        else:
            yield f"row {count}", record


def _history(value: object, depth: int) -> list[object] | None:
    if not isinstance(value, dict) or depth > _DEEPEST:
        return None
    if isinstance(value.get(_KEY), list):
        return value[_KEY]  # type: ignore[no-any-return]
    found = (_history(inner, depth + 1) for inner in value.values())
    return next((history for history in found if history is not None), None)
