"""Numbers: what a log wrote as a value, as a float; what is no number is None."""

from __future__ import annotations

import math
import re

_LONGEST = 400  # characters; beyond that no number is written
_PLAIN = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = rf"(?:{_PLAIN}|[-+]?(?:nan|NaN|NAN|inf|Inf|INF|[iI]nfinity)\b)"  # to be put into other patterns
_NO_ENDS = frozenset("%:;=sx/")
_TEXT = re.compile(NUMBER)
# as NumPy, torch and decimal print a scalar
_WRAPPED = re.compile(
    rf"(?:(?:np|numpy|torch|jnp|jax)\.)?(?:u?int\d*|float\d*|bfloat16|longdouble|tensor|array|Array|Decimal)"
    rf"\(\[?['\"]?({_PLAIN}|[-+]?(?:nan|NaN|inf|Inf|Infinity))['\"]?\]?(?:,[^()]{{0,100}})?\)"
)
_LARGEST_STEP = 2.0**53


def number(value: object) -> float | None:
    """Return a value as a float; None for truth values, for text that is no number and for what is absent."""
    if isinstance(value, float):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return text_number(value) if isinstance(value, str) else None


def text_number(text: str) -> float | None:
    """Return the number that a text is: `1.2e-05`, `nan`, `-Infinity`, `np.float64(0.0)`, `tensor(1.5)`."""
    if len(text) > _LONGEST:
        return None
    text = text.strip()
    if not text or text[-1] in _NO_ENDS:
        return None
    if text[-1] != ")":
        return float(text) if _TEXT.fullmatch(text) else None
    wrapped = _WRAPPED.fullmatch(text)
    return float(wrapped[1]) if wrapped else None


def whole(value: float | None) -> int | None:
    """Return a number as the step that it can be, or None."""
    if value is None or not -_LARGEST_STEP <= value <= _LARGEST_STEP or value != math.floor(value):
        return None
    return int(value)
