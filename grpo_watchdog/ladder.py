"""Ladder: how far to go back, and what to do when the trouble comes back all the same.

Rung by rung (the policy's `ladder:`): the first time the first rung, then, each time that trouble returns within
`recur_within` observations, the next; the last one again until the rollback budget is used. A rung's numbers are
factors on what each setting was just before the trouble began: 1.0 holds it there, and costs a healthy run nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_watchdog.actions import KNOB_ACTIONS, Order
from grpo_watchdog.checkpoints import Checkpoint, Ledger, serial
from grpo_watchdog.dose import Dose, Want
from grpo_watchdog.rulebook import Policy

_PAST = 64  # observations for which settings are remembered


class Ladder:
    """Remembers the rollbacks and the rungs that were climbed.

    Args:
        policy: the rulebook's.
        bases: what each knob was set to at attach; a knob that is not there cannot be dosed.
        restorable: whether checkpoints can be taken and restored.
    """

    def __init__(self, policy: Policy, bases: Mapping[str, float], *, restorable: bool) -> None:
        """Start at the foot."""
        self._policy, self._bases, self._restorable = policy, dict(bases), restorable
        self._rungs: Sequence[Mapping[str, float]] = policy.ladder or [{"rollback": True}]
        self._rollbacks: list[tuple[int, str]] = []  # (observation, checkpoint id)
        self._rung = -1  # the last one climbed
        self._climbed = 0  # when
        self._wait = 0  # a rung that only dosed is given this long to show its effect
        self._past: deque[dict[str, float]] = deque(maxlen=_PAST)
        self._before: dict[str, float] = {}  # the settings before the trouble that was last answered

    def diverged(self, want: Want, ledger: Ledger, now: int) -> list[Order]:
        """Return the rollback, or the halt where there is nothing to roll back to, no budget, or no wish."""
        newest, deeper = self._targets(ledger, want, now)
        why = self._no_way(newest, deeper, now)
        if why:
            return self._halt(want, newest, f"{want.reason}; {why}")
        return [self._rollback(want, deeper)]

    def saw(self, values: Mapping[str, float]) -> None:
        """Remember what the settings are on this observation."""
        self._past.append({name: values[name] for name in self._bases if name in values})

    def at_foot(self, now: int) -> bool:
        """Return whether the next rung would be the first."""
        return self._rung < 0 or now - self._climbed > self._policy.recur_within

    def climb(self, want: Want, ledger: Ledger, now: int, doses: Mapping[str, Dose]) -> list[Order]:
        """Return the orders of the next rung that changes anything; none while the last one has yet to show."""
        if now < self._wait:
            return []
        newest, deeper = self._targets(ledger, want, now)
        self._before = self._past[max(0, len(self._past) - 2 - want.age)] if self._past else {}
        first = 0 if self.at_foot(now) else min(self._rung + 1, len(self._rungs) - 1)
        spent = len(self._rollbacks) >= self._policy.rollback_budget
        for index in range(first, len(self._rungs)):
            rung = self._rungs[index]
            back = deeper or newest  # a rung that doses may try the same checkpoint again
            if rung.get("halt") or (rung.get("rollback") and (spent or self._policy.on_divergence == "halt")):
                break
            orders = [self._rollback(want, back)] if rung.get("rollback") and back else []
            orders += self._doses(rung, want, doses, restores=bool(back))
            if orders:
                return [order._replace(rung=index) for order in orders]
        used = f"all {self._policy.rollback_budget} rollbacks of the budget are used" if spent else ""
        why = used or self._no_way(newest, newest, now) or "the trouble came back after every rung of the ladder"
        return self._halt(want, newest, f"{want.reason}; {why}")

    def climbed(self, order: Order, now: int, *, restored: bool) -> None:
        """Learn that an order of a rung was carried out, and whether the run was rolled back with it."""
        self._rung, self._climbed = order.rung, now
        self._wait = 0 if restored else now + self._policy.effect_within
        if restored:  # what was in force until now belongs to the trouble: what comes next is held against what is now
            action = KNOB_ACTIONS.get(order.action)
            if action is not None and order.target is not None:
                usual = self._before.get(action.knob, self._bases[action.knob])
                self._before = {**self._before, action.knob: action.merge(usual, order.target)}
            self._past = deque([self._before], maxlen=_PAST)

    def rolled_back(self, now: int, checkpoint: str) -> None:
        """Learn of a rollback."""
        self._rollbacks.append((now, checkpoint))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "rollbacks": [list(r) for r in self._rollbacks], "rung": self._rung, "climbed": self._climbed,
            "wait": self._wait, "past": [dict(settings) for settings in self._past],
            "before": dict(self._before),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._rollbacks = [(r[0], r[1]) for r in state["rollbacks"]]
        self._rung, self._climbed, self._wait = state["rung"], state["climbed"], state["wait"]
        self._past, self._before = deque(state["past"], maxlen=_PAST), dict(state["before"])

    def _targets(self, ledger: Ledger, want: Want, now: int) -> tuple[list[Checkpoint], list[Checkpoint]]:
        """Return what may be gone back to, best first, and what of it is left where the last choice has failed."""
        newest = ledger.choices(older_than=want.age)
        last = self._rollbacks[-1] if self._rollbacks else None
        again = last is not None and now - last[0] <= self._policy.recur_within
        if (
            again and last and newest and serial(newest[0].id) <= serial(last[1])
        ):  # none was proven since: that one failed
            return newest, [c for c in newest if serial(c.id) < serial(last[1])]
        return newest, newest

    def _no_way(self, newest: Sequence[Checkpoint], deeper: Sequence[Checkpoint], now: int) -> str:
        """Return why there can be no rollback, or ""."""
        budget = self._policy.rollback_budget
        if self._policy.on_divergence == "halt":
            return "on_divergence is halt"
        if not newest:
            return "no checkpoint is proven yet" if self._restorable else "this trainer offers no checkpoints"
        if len(self._rollbacks) >= budget:
            return f"all {budget} rollbacks of the budget are used"
        if not deeper:
            after = now - self._rollbacks[-1][0]
            return f"trouble came back {after} observations after a rollback and no older checkpoint is proven"
        return ""

    def _rollback(self, want: Want, targets: Sequence[Checkpoint], reason: str = "") -> Order:
        ids = tuple(c.id for c in targets)
        replay = self._policy.replay_data
        return Order("rollback", None, want.rule, reason or want.reason, checkpoints=ids, replay_data=replay)

    def _halt(self, want: Want, newest: Sequence[Checkpoint], why: str) -> list[Order]:
        restore = [self._rollback(want, newest, "the state to halt in")] if newest else []
        return [*restore, Order("halt", None, want.rule, why)]

    def _doses(self, rung: Mapping[str, float], want: Want, held: Mapping[str, Dose], *, restores: bool) -> list[Order]:
        """Return the orders for the knobs of a rung that are not held as tightly already."""
        orders = []
        for name, factor in rung.items():
            action = KNOB_ACTIONS.get(name)
            if action is None or not self._bases.get(action.knob):
                continue
            limit = self._before.get(action.knob, self._bases[action.knob]) * factor
            dose = held.get(name)
            changes = factor != 1 or restores  # without a rollback, to hold a setting where it is changes nothing
            if limit > 0 and changes and (dose is None or action.merge(dose.limit, limit) != dose.limit):
                orders.append(Order(name, limit, want.rule, want.reason))
        return orders
