"""What a trainer lets us read, turn, save and restore: the protocols, and the knobs that need no trainer.

A `Dial` (`dials.py`) is how one number is read and written. A `Knob` holds such a number below a ceiling or above a
floor until it is released. `Controls` is all that a trainer offers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from grpo_watchdog.dials import Dial, attr, dial, item, number

__all__ = ["Check", "Controls", "Dial", "DialKnob", "Knob", "NoControls", "Scheduled", "Veto", "attr", "dial", "item"]


class Knob(Protocol):
    """One number of the trainer that can be held and released."""

    where: str

    def read(self) -> float:
        """Return the value in force."""
        ...

    def own(self) -> float:
        """Return what the user or the schedule has it at, whatever limit is held."""
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


@runtime_checkable
class Scheduled(Protocol):
    """A knob whose own value follows a schedule, and can go on doing so below a ceiling."""

    def follow(self) -> None:
        """Keep the schedule's shape below the ceiling that is held: somebody multiplied it."""
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
        return number(self._dial.read())

    def own(self) -> float:
        """Return the user's value; while a limit is held, what somebody else wrote since counts as that."""
        now = self.read()
        return self._own if self._limit is not None and self._untouched(now) else now

    def base(self) -> float:
        """Return the value at attach."""
        return self._base

    def put_back(self, own: float) -> None:
        """Make an earlier value the user's again; a limit that is held is applied to it."""
        if self._limit is None:
            self._dial.write(own)
        else:
            self._own = own
            self._apply(self._limit)

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

    def as_it_is(self) -> tuple[float, dict[str, Any]]:
        """Return what is there, and what this knob remembers of it."""
        return self._dial.read(), dict(vars(self))

    def put_as_it_was(self, state: tuple[float, dict[str, Any]]) -> None:
        """Put both back."""
        there, remembered = state
        if self._dial.read() is not there:
            self._dial.write(there)
        vars(self).update(remembered)

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


class Veto(NamedTuple):
    """When an optimizer step is skipped: its gradient is not finite, or absurd beside the run's own.

    Attributes:
        factor: an absurd gradient norm is more than this many times the median of the run's last accepted norms.
        most: absurd but finite gradients vetoed one after the other before such steps are let through:
            a scale that really changed must not freeze the run. A gradient that is not finite is always vetoed.
        dry: only count what would be vetoed, and change nothing.
    """

    factor: float = 1000.0
    most: int = 3
    dry: bool = False


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

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Restore everything from such a folder, or leave everything as it was and raise.

        `replay_data` False leaves what decides which data comes next where it is now: the data that led into
        trouble does not come again.
        """
        ...

    def inspect(self) -> list[Check]:
        """Look at the state of the model."""
        ...

    def measure(self) -> dict[str, float]:
        """Return metrics that the trainer does not emit and that cost something: param_change, param_drift."""
        ...

    def signals(self) -> dict[str, float]:
        """Return what is watched on every optimizer step, the worst since the last call; {} where nothing is.

        param_change, weights_touched, moments_touched and reference_touched are relative changes [1], vetoes a
        count [steps]. Read once an observation.
        """
        ...

    def arm(self, veto: Veto | None) -> None:
        """Veto poisoned optimizer steps from now on; None vetoes none."""
        ...

    def vetoed(self) -> list[str]:
        """Return a sentence for each step vetoed since the last call; bounded."""
        ...

    def pause(self, *, on: bool) -> None:
        """Skip every optimizer step from now on, with no state touched, or none any more."""
        ...

    def rebase(self) -> None:
        """Take weights, moments and reference as they are now: they were written on purpose."""
        ...


class NoControls:
    """A trainer that lets itself be watched, and nothing else."""

    knobs: Mapping[str, Knob] = {}
    restorable = False

    def save(self, folder: Path) -> None:
        """Do nothing: never called, since it is not `restorable`."""

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Do nothing: never called, since it is not `restorable`."""

    def inspect(self) -> list[Check]:
        """Return nothing."""
        return []

    def measure(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def signals(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def arm(self, veto: Veto | None) -> None:
        """Do nothing: there is no optimizer whose steps could be vetoed."""

    def vetoed(self) -> list[str]:
        """Return nothing."""
        return []

    def pause(self, *, on: bool) -> None:
        """Raise: there is no optimizer whose steps could be skipped."""
        raise NotImplementedError("nothing was handed over that could be paused")

    def rebase(self) -> None:
        """Do nothing: nothing is watched."""
