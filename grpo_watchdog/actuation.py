"""Actuation: orders become outcomes. The only place with side effects on the trainer.

Nothing raises out of here: what fails is an outcome that says so. Every knob that is held is read back on
the next observation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from grpo_watchdog.actions import ACTIONS, KNOB_ACTIONS, Order, Outcome
from grpo_watchdog.approval import Desk, Side
from grpo_watchdog.checkpoints import Vault, step_of
from grpo_watchdog.controls import Check, Controls, Knob
from grpo_watchdog.drill import DrillReport, Proof
from grpo_watchdog.errors import RestartError
from grpo_watchdog.metrics import METRICS

_log = logging.getLogger("grpo_watchdog")


class Actuator(Side, Protocol):
    """What the watchdog asks of the side that touches the trainer; a replay offers the same from a journal."""

    def read(self) -> dict[str, float]:
        """Return the value in force of every knob, what the user or the schedule set it to, and the signals."""
        ...

    def check(self, doses: Mapping[str, str], step: int) -> list[Outcome]:
        """Return an outcome for every vetoed step and every held knob that did not stay; `doses` is action to rule."""
        ...

    def expect(self, metrics: Sequence[str]) -> None:
        """Take what these metrics are of as it is now."""
        ...

    def execute(self, order: Order, step: int) -> Outcome:
        """Carry one order out."""
        ...

    def inspect(self) -> list[Check]:
        """Look at the state of the model."""
        ...

    def measure(self) -> dict[str, float]:
        """Return the metrics that are taken on a schedule."""
        ...

    def settle_checkpoints(self, proven: Sequence[str], gone: Sequence[str]) -> None:
        """Stamp and delete checkpoints."""
        ...


class Actuation:
    """Carries orders out on real controls.

    Args:
        controls: what the trainer offers.
        vault: where checkpoints go, or None where there is no folder for them.
        memory: returns the findings' state, stored with each checkpoint.
        desk: where questions are asked.
        shadow: rules and actions whose orders are not carried out.
        shadow_all: whether none is: not even a checkpoint is written.
    """

    def __init__(
        self,
        controls: Controls,
        vault: Vault | None,
        memory: Callable[[], dict[str, Any]],
        *,
        desk: Desk | None = None,
        shadow: Sequence[str] = (),
        shadow_all: bool = False,
    ) -> None:
        """Touch nothing yet."""
        self._controls, self._vault, self._memory = controls, vault, memory
        self._desk = Desk(None, None) if desk is None else desk
        self._shadow, self._shadow_all = frozenset(shadow), shadow_all
        self._shadowed = 0  # checkpoints that were only thought of
        self.knobs: Mapping[str, Knob] = controls.knobs
        self._broken: set[str] = set()

    def read(self) -> dict[str, float]:
        """Return the value in force of every knob that can be read, what it was set to, and the signals."""
        values = {}
        for name, knob in self.knobs.items():
            try:
                values[name] = float(knob.read())
                if f"{name}_set" in METRICS:
                    values[f"{name}_set"] = float(knob.own())
            except Exception as error:  # noqa: BLE001 - a trainer's own getter may raise anything
                self._say_once(name, f"knob {name} ({knob.where}) cannot be read: {error}")
        try:
            values.update(self._controls.signals())
        except Exception as error:  # noqa: BLE001
            self._say_once("signals", f"what is watched on every optimizer step cannot be read: {error}")
        return values

    def check(self, doses: Mapping[str, str], step: int) -> list[Outcome]:
        """Tell of vetoed steps; read every held knob back, and re-apply what somebody overwrote."""
        outcomes = self._vetoes(step)
        for action_name, rule in doses.items():
            action = KNOB_ACTIONS[action_name]
            knob = self.knobs.get(action.knob)
            if knob is None:
                continue
            try:
                trouble = knob.check()
                now = knob.read() if trouble else None
            except Exception as error:  # noqa: BLE001
                trouble, now = f"{knob.where}: {type(error).__name__}: {error}", None
            if trouble:
                reason = "read back on the next observation"
                outcomes.append(Outcome(step, action_name, None, now, rule, reason, ok=False, detail=trouble))
        return outcomes

    def execute(self, order: Order, step: int) -> Outcome:
        """Carry one order out; what fails is an outcome, and a knob is read back at once."""
        names = (order.rule, order.action, "escalate" if order.rung >= 0 else order.action)
        if self._shadow_all or not self._shadow.isdisjoint(names):
            return self._imagine(order, step)
        try:
            outcome = ACTIONS[order.action].act(order, self, step)
        except Exception as error:  # noqa: BLE001 - an action that fails is an outcome
            detail = f"{type(error).__name__}: {error}"
            outcome = Outcome(step, order.action, None, None, order.rule, order.reason, ok=False, detail=detail)
        action = KNOB_ACTIONS.get(order.action)
        if action is None or order.release or not outcome.ok or outcome.after is None or order.target is None:
            return outcome
        safe = action.merge(outcome.after, order.target)
        if not math.isclose(safe, outcome.after, rel_tol=1e-5):
            detail = f"{self.knobs[action.knob].where} reads {outcome.after:g} after it was held at {order.target:g}"
            return outcome._replace(ok=False, detail=detail)
        return outcome

    def inspect(self) -> list[Check]:
        """Look at the model; a check that fails to run is a check that could not tell."""
        try:
            return self._controls.inspect()
        except Exception as error:  # noqa: BLE001
            return [Check("inspection", None, f"the look at the model failed: {type(error).__name__}: {error}")]

    def measure(self) -> dict[str, float]:
        """Return the scheduled metrics; none where measuring fails."""
        try:
            return {name: float(value) for name, value in self._controls.measure().items()}
        except Exception as error:  # noqa: BLE001
            self._say_once("measure", f"param_change and param_drift cannot be measured: {error}")
            return {}

    def save(self, order: Order, step: int) -> Outcome:
        """Take a checkpoint; `detail` is its id."""
        if self._vault is None or not self._controls.restorable:
            detail = "no run_dir, or the trainer offers no checkpoints"
            return Outcome(step, order.action, None, None, order.rule, order.reason, ok=False, detail=detail)
        with ExitStack() as lifted:
            for knob in self.knobs.values():
                lifted.enter_context(knob.lifted())
            checkpoint = self._vault.save(step, self._controls.save, self._memory())
        return Outcome(step, order.action, None, float(step), order.rule, order.reason, detail=checkpoint)

    def roll_back(self, order: Order, step: int) -> Outcome:
        """Restore the first of the ordered checkpoints that verifies; nothing is touched where none does."""
        failures = []
        for checkpoint in order.checkpoints if self._vault is not None else ():
            assert self._vault is not None
            try:
                self._controls.restore(self._vault.verify(checkpoint), replay_data=order.replay_data)
            except Exception as error:  # noqa: BLE001 - damaged, or it does not fit: the next one may
                failures.append(f"{checkpoint}: {error}")
                _log.warning("rollback to %s failed: %s", checkpoint, error)
                if isinstance(error, RestartError):  # so would any other
                    break
                continue
            for knob in self.knobs.values():  # the doses on top of what was restored
                try:
                    knob.check()
                except Exception as error:  # noqa: BLE001 - said again when it is read back on the next observation
                    _log.warning("%s after the rollback: %s", knob.where, error)
            after = float(step_of(checkpoint))
            reason = "; ".join([order.reason, *(f"passed over {f}" for f in failures)])
            return Outcome(step, order.action, float(step), after, order.rule, reason, detail=checkpoint)
        detail = "; ".join(failures) or "there is no checkpoint to go to"
        return Outcome(step, order.action, float(step), None, order.rule, order.reason, ok=False, detail=detail)

    def pause(self, *, on: bool) -> None:
        """Skip every optimizer step from now on, or none any more."""
        self._controls.pause(on=on)

    def settle_checkpoints(self, proven: Sequence[str], gone: Sequence[str]) -> None:
        """Stamp what is proven, delete what is not wanted any more."""
        if self._vault is None or self._shadow_all:
            return
        for checkpoint in proven:
            try:
                self._vault.stamp(checkpoint)
            except OSError as error:
                self._say_once("stamp", f"checkpoint {checkpoint} cannot be stamped as proven: {error}")
        for checkpoint in gone:
            self._vault.delete(checkpoint)

    def drill(self, loss: Callable[[], Any] | None) -> DrillReport:
        """Prove on the trainer what can be proven."""
        drill = getattr(self._controls, "drill", None)
        if drill is None:
            return DrillReport((Proof("drill", "unproven", "this trainer offers nothing to try it on", 0.0),))
        return DrillReport(tuple(drill(loss)))

    def ask(self, question: Mapping[str, Any]) -> None:
        """Put a question to the user."""
        self._desk.ask(question)

    def answer(self, question: Mapping[str, Any]) -> bool | None:
        """Return the answer to a question, or None while there is none."""
        return self._desk.answer(question)

    def settled(self, number: int) -> None:
        """Take a question off the desk."""
        self._desk.settled(number)

    def expect(self, metrics: Sequence[str]) -> None:
        """Have the trainer's side take its weights, moments and reference as they are now."""
        try:
            if any(name.endswith("_touched") for name in metrics):
                self._controls.rebase()
        except Exception as error:  # noqa: BLE001
            self._say_once("rebase", f"the weights cannot be taken as they are: {error}")

    def _vetoes(self, step: int) -> list[Outcome]:
        try:
            told = self._controls.vetoed()
        except Exception as error:  # noqa: BLE001
            self._say_once("vetoed", f"which steps were vetoed cannot be told: {error}")
            return []
        held_back = "shadow" if self._shadow_all or "veto" in self._shadow else ""
        return [Outcome(step, "veto", None, None, "veto", text, held_back=held_back) for text in told]

    def _imagine(self, order: Order, step: int) -> Outcome:
        """Return what would have been done, with nothing touched and nothing written."""
        outcome = Outcome(step, order.action, None, order.target, order.rule, order.reason, held_back="shadow")
        action = KNOB_ACTIONS.get(order.action)
        if action is not None:
            knob = self.knobs.get(action.knob)
            before = None if knob is None else _or_none(knob.read)
            after = None if before is None or order.target is None else action.merge(before, order.target)
            name = action.release_name if order.release or order.loosens else order.action
            return outcome._replace(action=name, before=before, after=after)
        if order.action == "checkpoint_now" and self._shadow_all:  # thought of, so that a rollback has somewhere to go
            self._shadowed += 1
            detail = f"shadow-{self._shadowed:06d}-step-{step}"
            return outcome._replace(after=float(step), detail=detail, held_back="")
        if order.action == "rollback" and order.checkpoints:
            target = order.checkpoints[0]
            after = float(step_of(target))
            return outcome._replace(before=float(step), after=after, detail=target)
        return outcome

    def _say_once(self, key: str, text: str) -> None:
        if key not in self._broken:
            self._broken.add(key)
            _log.warning("%s", text)


def _or_none(read: Callable[[], float]) -> float | None:
    try:
        return float(read())
    except Exception:  # noqa: BLE001 - a trainer's own getter may raise anything
        return None
