"""Flatten: one record of a log, however nested, as keys and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from grpo_watchdog.logs.numbers import number

DEEPEST = 32  # levels of nesting; what lies deeper is left out
MOST_KEYS = 20_000  # of one record; beyond that it is no row of metrics
MOST_SUMMED = 1 << 20  # numbers in one list; a longer one is left out
LISTS = "lists of numbers are read as key/mean, key/std, key/min and key/max"


def flat(record: Mapping[str, object]) -> tuple[dict[str, float], bool]:
    """Return the numbers of a record by key, nested keys joined with "/", and whether lists were summed up.

    Text, truth values and what is absent are left out; a later key replaces an earlier one of the same name.
    """
    if len(record) < MOST_KEYS and all(type(value) is float for value in record.values()):
        return {str(key): value for key, value in record.items()}, False  # type: ignore[misc] # nearly every row is this
    values: dict[str, float] = {}
    lists = _into(values, "", record, 0)
    return values, lists


def _into(values: dict[str, float], prefix: str, record: Mapping[str, object], depth: int) -> bool:
    lists = False
    for key, value in record.items():
        if len(values) >= MOST_KEYS:
            break
        found = number(value)
        if found is not None:
            values[f"{prefix}{key}"] = found
        elif isinstance(value, dict) and depth < DEEPEST:
            lists |= _into(values, f"{prefix}{key}/", value, depth + 1)
        elif isinstance(value, list | tuple):
            lists |= _summed(values, f"{prefix}{key}", value)
    return lists


def _summed(values: dict[str, float], key: str, given: list[object] | tuple[object, ...]) -> bool:
    """Put mean, standard deviation, minimum and maximum of a list of numbers; one number is that number."""
    if len(given) > MOST_SUMMED:
        return False
    numbers = [found for value in given if (found := number(value)) is not None]
    if not numbers or len(numbers) < len(given):
        return False
    if len(numbers) == 1:
        values[key] = numbers[0]
        return False
    if any(value != value for value in numbers):  # noqa: PLR0124 - not-a-number
        mean = std = low = high = math.nan
    else:
        low, high = min(numbers), max(numbers)
        mean = math.fsum(numbers) / len(numbers) if math.isfinite(low) and math.isfinite(high) else low + high
        std = math.dist(numbers, [mean] * len(numbers)) / math.sqrt(len(numbers) - 1)
    values.update({f"{key}/mean": mean, f"{key}/std": std, f"{key}/min": low, f"{key}/max": high})
    return True
