"""What an action is: an order from the plan goes in, an outcome comes back, the hands do the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from grpo_watchdog.controls import Knob, Scheduled


class Order(NamedTuple):
    """One thing that the plan wants done.

    Attributes:
        action: the action's name.
        target: the limit to hold a knob at, the factor, or None where the action needs no number.
        rule: the rule that asked for it.
        reason: why, in one sentence.
        release: whether the knob is let go instead of held.
        checkpoints: for a rollback, the ids it may go to, best first.
        replay_data: for a rollback, whether the data and the random state come back too.
        rung: which rung of the ladder it belongs to; -1 for none.
        loosens: whether the limit is let up a step: it is held, more loosely than before.
    """

    action: str
    target: float | None
    rule: str
    reason: str
    release: bool = False
    checkpoints: tuple[str, ...] = ()
    replay_data: bool = True
    rung: int = -1
    loosens: bool = False


class Outcome(NamedTuple):
    """What became of an order; the JSON of an action in every report.

    Attributes:
        step: the step at which it was done.
        action: the action's name, or the name of its release.
        before: the value (or the step) before.
        after: the value (or the step) after, read back.
        rule: the rule that asked for it.
        reason: why, in one sentence.
        ok: whether it was done.
        detail: what the numbers do not say: why it failed, what a checkpoint's id is.
        held_back: "" where it was carried out; else why nothing was touched: "shadow", or "declined".
    """

    step: int
    action: str
    before: float | None
    after: float | None
    rule: str
    reason: str
    ok: bool = True
    detail: str = ""
    held_back: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the frozen JSON form."""
        return self._asdict()


class Hands(Protocol):
    """What an action may do to the run; actuation offers it."""

    knobs: Mapping[str, Knob]

    def save(self, order: Order, step: int) -> Outcome:
        """Take a checkpoint."""
        ...

    def roll_back(self, order: Order, step: int) -> Outcome:
        """Restore the newest proven checkpoint that verifies."""
        ...

    def pause(self, *, on: bool) -> None:
        """Skip every optimizer step from now on, or none any more."""
        ...


class Action(Protocol):
    """One thing that can be done to a run.

    Attributes:
        name: as rulebooks and JSON spell it.
        takes: "number" where a rule gives it a target, "flag" where `true` is all there is to say.
    """

    @property
    def name(self) -> str:
        """Return the name."""
        ...

    @property
    def takes(self) -> Literal["number", "flag"]:
        """Return whether a rule gives it a number or a flag."""
        ...

    def merge(self, first: float, second: float) -> float:
        """Return the safer of two targets."""
        ...

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:
        """Do it; trouble is an outcome with `ok` False, never an exception."""
        ...


@dataclass(frozen=True)
class KnobAction:
    """Holds one knob on the safe side of a target: a ceiling (`safe="min"`) or a floor (`safe="max"`)."""

    name: str
    knob: str
    safe: Literal["min", "max"]
    release_name: str
    takes: Literal["number", "flag"] = "number"

    def merge(self, first: float, second: float) -> float:
        """Return the lower ceiling, or the higher floor."""
        return min(first, second) if self.safe == "min" else max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:
        """Hold or release the knob and read it back."""
        name = self.release_name if order.release or order.loosens else self.name
        knob = hands.knobs.get(self.knob)
        if knob is None:
            detail = f"there is no {self.knob} knob on this trainer"
            return Outcome(step, name, None, None, order.rule, order.reason, ok=False, detail=detail)
        before = after = None
        try:
            before = float(knob.read())
            if order.release:
                knob.release()
            else:
                assert order.target is not None
                knob.hold(order.target)
                if order.rung >= 0 and isinstance(knob, Scheduled):  # held at what it was: and that had a shape
                    knob.follow()
            after = float(knob.read())
        except Exception as error:  # noqa: BLE001 - a trainer's own setter may raise anything
            detail = f"{knob.where}: {type(error).__name__}: {error}"
            return Outcome(step, name, before, after, order.rule, order.reason, ok=False, detail=detail)
        return Outcome(step, name, before, after, order.rule, order.reason)
