"""What a trainer lets us read, turn, save and restore: the protocols, and the knobs that need no trainer.

A `Dial` is how one number is read and written (an attribute, an item, a pair of functions). A `Knob` holds
such a number below a ceiling or above a floor until it is released. `Controls` is all that a trainer offers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

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
            put(first if type(first) is not float and _number(first) == value else value)

    return Dial(lambda: _number(get()), write, where)


def _number(value: Any) -> float:  # noqa: ANN401
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
        now = _number(spec.read())
        if math.isfinite(now):
            spec.write(now)
    except Exception as error:
        raise ConfigurationError(f"{name} ({spec.where}) cannot be turned: {error}") from error
    if not math.isfinite(now):
        raise ConfigurationError(f"{name} ({spec.where}) is {now}; it must be finite")
    return spec


class Knob(Protocol):
    """One number of the trainer that can be held and released."""

    where: str

    def read(self) -> float:
        """Return the value in force."""
        ...

    def base(self) -> float:
        """Return the value that the user set, as it was at attach: what scaled targets are scaled from."""
        ...

    def hold(self, limit: float) -> None:
        """Keep the value at or on the safe side of `limit` from now on, whoever else writes it."""
        ...

    def release(self) -> None:
        """Let go: the value is again what the user, or the user's scheduler, says."""
        ...

    def check(self) -> str | None:
        """Return why the hold did not take since the last check, or None; re-apply it where possible."""
        ...

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which the value is the user's own: what a checkpoint holds is never our dose."""
        ...


class DialKnob:
    """Holds what a dial turns: a floor (`safe="max"`) or a ceiling (`safe="min"`).

    What somebody else writes while it is held (an adaptive KL controller, say) is kept as the user's value
    for the release, and the limit is applied to it again.
    """

    def __init__(self, spec: Dial, safe: Literal["min", "max"]) -> None:
        """Read the user's value once."""
        self.where = spec.where
        self._dial = spec
        self._ceiling = safe == "min"
        self._base = self._own = self.read()
        self._limit: float | None = None
        self._wrote = math.nan
        self._same_object = False  # whether reading gives the very object that was written
        self._overwritten = 0

    def read(self) -> float:
        """Return the value in force."""
        return _number(self._dial.read())

    def base(self) -> float:
        """Return the value at attach."""
        return self._base

    def hold(self, limit: float) -> None:
        """Apply the limit to the user's value and remember it."""
        now = self.read()
        if self._limit is None or not self._untouched(now):
            self._own = now
        self._apply(limit)

    def release(self) -> None:
        """Write the user's value back, unless somebody has written another since."""
        if self._limit is not None:
            if self._untouched(self.read()):
                self._dial.write(self._own)
            self._limit, self._overwritten = None, 0

    def check(self) -> str | None:
        """Re-apply the limit where somebody overwrote it, and say so: the first time, the second, the fourth ..."""
        if self._limit is None:
            return None
        now = self.read()
        if self._untouched(now):
            return None
        wrote, self._own = self._wrote, now
        self._apply(self._limit)
        if self._wrote == now:  # theirs is on the safe side
            return None
        self._overwritten += 1
        if self._overwritten & (self._overwritten - 1):
            return None
        times = f" (for the {self._overwritten}th time)" if self._overwritten > 1 else ""
        return f"{self.where} was {wrote:g} and somebody set it to {now:g}: held at {self._wrote:g} again{times}"

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Write the user's value for the time of the context."""
        limit = self._limit
        if limit is None or not self._untouched(self.read()):
            yield
            return
        self._dial.write(self._own)
        try:
            yield
        finally:
            self._apply(limit)

    def _apply(self, limit: float) -> None:
        safe = self._own <= limit if self._ceiling else self._own >= limit  # NaN is on no safe side
        self._dial.write(self._own if safe else limit * 1.0)  # a fresh object: see _untouched
        self._wrote, self._limit = self.read(), limit  # as stored: a float32 tensor rounds
        self._same_object = self._wrote is self.read()

    def _untouched(self, now: float) -> bool:
        """Return whether what is there is what was written, and not the same number written by somebody else."""
        return now is self._wrote if self._same_object else now == self._wrote


class Check(NamedTuple):
    """One look at the state of the model.

    Attributes:
        name: what was looked at.
        passed: whether it is as it should be; None where that could not be told.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str


class Controls(Protocol):
    """All that a trainer offers. Whatever it lacks is said at attach, and done without."""

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """Return the knobs by metric name: learning_rate, kl_coef, clip_epsilon, grad_norm_limit."""
        ...

    @property
    def restorable(self) -> bool:
        """Return whether `save` and `restore` work."""
        ...

    def save(self, folder: Path) -> None:
        """Write the whole training state into an empty folder; raise CheckpointError where it is not finite."""
        ...

    def restore(self, folder: Path) -> None:
        """Restore everything from such a folder, or leave everything as it was and raise."""
        ...

    def inspect(self) -> list[Check]:
        """Look at the state of the model."""
        ...

    def measure(self) -> dict[str, float]:
        """Return metrics that the trainer does not emit and that cost something: param_change, param_drift."""
        ...


class NoControls:
    """A trainer that lets itself be watched, and nothing else."""

    knobs: Mapping[str, Knob] = {}
    restorable = False

    def save(self, folder: Path) -> None:
        """Do nothing: never called, since it is not `restorable`."""

    restore = save

    def inspect(self) -> list[Check]:
        """Return nothing."""
        return []

    def measure(self) -> dict[str, float]:
        """Return nothing."""
        return {}
