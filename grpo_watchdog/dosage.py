"""Dosage: the limits in force: given, judged by their effect, and let up when the run has been healthy for long.

All counts are observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpo_watchdog.actions import KNOB_ACTIONS, Order, Outcome
from grpo_watchdog.dose import Dose, Effect, Want
from grpo_watchdog.rulebook import Rulebook

_WATCHED_FOR_EFFECT = ("kl", "kl_penalty", "log_ratio")
_MOST_PATIENCE = 64


class Dosage:
    """Keeps the doses of one run.

    Args:
        book: the rulebook, its policy included.
        bases: what each knob was set to at attach; a knob that is not there cannot be dosed.
    """

    def __init__(self, book: Rulebook, bases: Mapping[str, float]) -> None:
        """Start with nothing in force."""
        self._book, self._policy, self._bases = book, book.policy, dict(bases)
        self._patience = 1
        self._lifted: set[str] = set()
        self._locked: dict[str, tuple[int, int]] = {}  # action -> (until, unless the rank is above)
        self.doses: dict[str, Dose] = {}

    def order(self, name: str, want: Want, now: int) -> Order | None:
        """Return the order for what a rule wants of a knob, or None where it is held, locked, or not there."""
        action = KNOB_ACTIONS[name]
        if action.knob not in self._bases:
            return None
        scaled = self._policy.targets == "scaled"
        limit = self._book.limit(name, want.target, self._bases[action.knob], scaled=scaled)
        held = self.doses.get(name)
        if held is not None and action.merge(held.limit, limit) == held.limit:
            return None
        until, rank = self._locked.get(name, (0, 0))
        if now < until and want.rank <= rank:
            return None
        return Order(name, limit, want.rule, want.reason)

    def healthy_for(self, streak: int) -> bool:
        """Return whether a healthy streak is long enough to let up."""
        return streak >= self._policy.recover_after * self._patience

    def recovery(self, values: Mapping[str, float], streak: int, now: int) -> list[Order]:
        """Return the releases, or the loosened limits, that are due; one that failed is tried after the cool-down."""
        why = f"healthy for {streak} observations"
        due = [name for name in self.doses if now >= self._locked.get(name, (0, 0))[0]]
        if self._policy.rewarm is None:
            return [Order(name, None, self.doses[name].rule, why, release=True) for name in due]
        rested = [name for name in due if self.healthy_for(now - self.doses[name].given)]
        return [order for name in rested if (order := self._loosened(name, why, values)) is not None]

    def effects(
        self, values: Mapping[str, float], firing: set[str], now: int
    ) -> tuple[list[Effect], list[Order], Want | None]:
        """Look at doses that have had their time.

        A KL dose is taken back where the KL did not fall (reading 9). Where there is a ladder, so is any other dose
        that did not help, and while its rule still fires that is a reason to climb: returned as what is wanted.
        """
        effects, orders, failed = list[Effect](), list[Order](), None
        for name, dose in list(self.doses.items()):
            after = values.get(dose.metric)
            if dose.judged or now - dose.given < self._policy.effect_within or after is None:
                continue
            self.doses[name] = dose._replace(judged=True)
            helped = abs(after) < dose.value or (math.isfinite(after) and not math.isfinite(dose.value))
            helped |= bool(self._policy.ladder) and dose.rule not in firing
            effects.append(Effect(name, dose.rule, dose.metric, dose.value, abs(after), helped))
            if helped or not (name == "raise_kl_coef" or self._policy.ladder):
                continue
            self._locked[name] = (now + self._policy.cooldown, dose.rank)
            fell = f"|{dose.metric}| did not fall ({dose.value:.4g} to {abs(after):.4g})"
            why = f"{fell} in {self._policy.effect_within} observations"
            orders.append(Order(name, None, dose.rule, why, release=True))
            if self._policy.ladder and dose.rule in firing:
                failed = Want(1.0, dose.rule, dose.rank, why, now - dose.given)
        return effects, orders, failed

    def note(
        self, order: Order, outcome: Outcome, rank: int, values: Mapping[str, float], *, now: int, streak: int
    ) -> None:
        """Learn what became of an order.

        Args:
            order: what was wanted.
            outcome: what became of it.
            rank: the level of the rule that asked.
            values: what was seen on this observation, against which the effect is judged; empty for no judgement.
            now: this observation.
            streak: how long the run has been healthy.
        """
        taken = outcome.ok or (not order.release and outcome.after is not None)  # held, though it reads otherwise
        if not taken:
            self._locked[order.action] = (now + max(1, self._policy.cooldown), rank)
        elif order.release:
            self.doses.pop(order.action, None)
            if self.healthy_for(streak):
                self._lifted.add(order.action)
        elif order.target is not None:
            held = self.doses.get(order.action)
            if order.loosens and held is not None:
                self._lifted.add(order.action)
                self.doses[order.action] = held._replace(limit=order.target, given=now, judged=True)
                return
            if order.action in self._lifted:  # it was let go too early: be slower next time
                self._lifted.clear()
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            metric = next((m for m in _WATCHED_FOR_EFFECT if m in values), "")
            size = abs(values[metric]) if metric else 0.0
            self.doses[order.action] = Dose(order.target, order.rule, rank, now, metric, size)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "patience": self._patience, "lifted": sorted(self._lifted),
            "locked": {k: list(v) for k, v in self._locked.items()},
            "doses": {k: list(v) for k, v in self.doses.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._patience, self._lifted = state["patience"], set(state["lifted"])
        self._locked = {k: (v[0], v[1]) for k, v in state["locked"].items()}
        self.doses = {k: Dose(*v) for k, v in state["doses"].items()}

    def _loosened(self, name: str, why: str, values: Mapping[str, float]) -> Order | None:
        """Return the order that lets a limit up one step, or go.

        It goes where the user's own value is within it: then it holds nothing. At what the run started with it stays,
        for what is beyond that nobody has announced (`Watchdog.expect`).
        """
        dose, action, rewarm = self.doses[name], KNOB_ACTIONS[name], self._policy.rewarm or 1.0
        own = values.get(f"{action.knob}_set")
        if own is not None and action.merge(own, dose.limit) == own:
            return Order(name, None, dose.rule, f"{why}, and {own:g} is within it", release=True)
        base = self._bases[action.knob]
        further = action.merge(base, dose.limit * rewarm if action.safe == "min" else dose.limit / rewarm)
        if action.merge(dose.limit, further) == further:
            return None
        return Order(name, further, dose.rule, why, loosens=True)
