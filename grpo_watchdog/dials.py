"""Dials: how one number of a trainer is read and written."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from grpo_watchdog.errors import ConfigurationError


class Dial(NamedTuple):
    """How one number of the trainer is read and written, and what to call the place."""

    read: Callable[[], float]
    write: Callable[[float], None]
    where: str


def attr(owner: object, name: str) -> Dial:
    """Return the dial for an attribute that the trainer reads on every step: `gw.attr(config, "beta")`.

    `owner` is the object that the training loop really reads (a copy of it turns nothing); the attribute is a
    float, an int or a 0-d tensor or array (which is then filled in place).

    Raises:
        ConfigurationError: there is no such attribute.
    """
    try:
        first = getattr(owner, name)
    except Exception as error:
        raise ConfigurationError(f"{type(owner).__name__} has no attribute {name!r} to read: {error}") from error
    return _place(
        lambda: getattr(owner, name), lambda value: setattr(owner, name, value), first, f"{type(owner).__name__}.{name}"
    )


def item(owner: MutableMapping[str, Any], key: str) -> Dial:
    """Return the dial for an item of a mapping; a ConfigurationError where there is no such key."""
    if key not in owner:
        known = ", ".join(map(repr, owner)) or "nothing"
        raise ConfigurationError(f"no item {key!r}; there is {known}")
    return _place(lambda: owner[key], lambda value: owner.__setitem__(key, value), owner[key], f"[{key!r}]")


def _place(get: Callable[[], Any], put: Callable[[Any], None], first: Any, where: str) -> Dial:  # noqa: ANN401
    """Return the dial for a place that holds a number, or a tensor or array that others hold too."""

    def write(value: float) -> None:
        now = get()
        if hasattr(now, "dtype") and hasattr(now, "__setitem__"):
            if "float" not in str(now.dtype):
                raise TypeError(f"a {type(now).__name__} of type {now.dtype} holds no fractions")
            (now.data if hasattr(now, "fill_") else now)[...] = value  # under autograd's nose
        else:  # the user's own value is of the user's own type: an int stays an int
            put(first if type(first) is not float and number(first) == value else value)

    return Dial(lambda: number(get()), write, where)


def number(value: Any) -> float:  # noqa: ANN401
    """Return what a place holds as a float; raise where it is no number."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is text, not a number")
    return float(value.detach() if hasattr(value, "detach") else value)


def dial(spec: Dial | tuple[Callable[[], float], Callable[[float], None]], name: str) -> Dial:
    """Return a working dial for what a user handed over as `name`, tried once without changing anything.

    Raises:
        ConfigurationError: it is no Dial or (read, write) pair, not a finite number, or not to be written.
    """
    if isinstance(spec, tuple) and len(spec) == 2 and all(map(callable, spec)):  # noqa: PLR2004
        spec = Dial(spec[0], spec[1], name)
    if not isinstance(spec, Dial):
        raise ConfigurationError(
            f"{name} must be gw.attr(object, 'name'), gw.item(dict, 'key') or a (read, write) pair of functions, "
            f"not {spec!r}: a plain number cannot be turned while the trainer runs"
        )
    try:
        now = number(spec.read())
        if math.isfinite(now):
            spec.write(now)
    except Exception as error:
        raise ConfigurationError(f"{name} ({spec.where}) cannot be turned: {error}") from error
    if not math.isfinite(now):
        raise ConfigurationError(f"{name} ({spec.where}) is {now}; it must be finite")
    return spec
