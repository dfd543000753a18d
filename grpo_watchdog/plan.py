"""Plan: incidents become orders, the smallest safe dose within budgets. It decides and never acts.

All counts are observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_watchdog.actions import ACTIONS, KNOB_ACTIONS, Order, Outcome
from grpo_watchdog.checkpoints import Ledger
from grpo_watchdog.dose import Dose, Effect, Want, wanted
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding

_WATCHED_FOR_EFFECT = ("kl", "kl_penalty", "log_ratio")
_MOST_PATIENCE = 64
_TURN = {name: turn for turn, name in enumerate(ACTIONS)}


class Planner:
    """Keeps the doses in force, the budget and the healthy streak.

    Args:
        book: the rulebook, its policy included.
        bases: what each knob was set to at attach; a knob that is not there cannot be dosed.
        restorable: whether checkpoints can be taken and restored.
    """

    def __init__(self, book: Rulebook, bases: Mapping[str, float], *, restorable: bool) -> None:
        """Start with nothing in force."""
        self._book, self._policy = book, book.policy
        self._bases, self._restorable = dict(bases), restorable
        self._dosing = {
            (rule_id, rank)
            for rule_id, rule in book.rules.items()
            for rank, level in enumerate(rule.ladder, start=1)
            if level.do
        }
        self._hints = any(level.severity == "notice" and level.do for r in book.rules.values() for level in r.ladder)
        self._now = 0
        self._healthy = 0
        self._patience = 1
        self._lifted: set[str] = set()
        self._locked: dict[str, tuple[int, int]] = {}  # action -> (until, unless the rank is above)
        self._rollbacks: list[tuple[int, str]] = []  # (observation, checkpoint id)
        self._once: set[str] = set()  # "rule/rank/action" of what was done once and is not done again
        self._interval = self._policy.checkpoint_every
        self._last_checkpoint = -self._interval  # the first one is due at once
        self.doses: dict[str, Dose] = {}
        self.halted = ""

    def plan(
        self, findings: Sequence[Finding], values: Mapping[str, float], ledger: Ledger
    ) -> tuple[list[Order], list[Effect]]:
        """Return what to do now, in the order in which to do it, and which earlier doses helped."""
        self._now += 1
        healthy = self.healthy(findings)
        self._healthy = self._healthy + 1 if healthy else 0
        if self._once:
            self._once = {key for key in self._once if key.split("/")[0] in {f.rule for f in findings}}
        if self.halted:
            return [], []
        if healthy and not self.doses and not self._hints:
            return self._due_checkpoint(ledger), []
        effects, orders = self._effects(values)
        wants = wanted(self._book, findings)
        if "rollback" in wants:
            orders += self._diverged(wants["rollback"], ledger)
        orders += [o for name in ACTIONS if name in wants and (o := self._order(name, wants[name])) is not None]
        if healthy:
            orders += self._recovery() + self._due_checkpoint(ledger)
        orders.sort(key=lambda order: _TURN[order.action])
        return orders, effects

    def healthy(self, findings: Sequence[Finding]) -> bool:
        """Return whether nothing fires that asks for a dose or is critical.

        A warning without a dose (a range in the document's units, say) is reported, but it neither holds up
        checkpoints nor keeps doses in force: it may stand for a whole healthy run.
        """
        if not findings or findings[0].severity == "notice":  # worst first
            return True
        return not any(
            f.severity == "critical" or (f.severity == "warning" and (f.rule, f.rank) in self._dosing) for f in findings
        )

    def settle(self, orders: Sequence[Order], outcomes: Sequence[Outcome], findings: Sequence[Finding],
               values: Mapping[str, float]) -> list[Order]:  # fmt: skip
        """Learn what became of the orders; return what must follow from it (a halt where a rollback failed)."""
        ranks = {f.rule: f.rank for f in findings}
        restored = any(o.action == "rollback" and o.ok for o in outcomes)
        follow: list[Order] = []
        for order, outcome in zip(orders, outcomes, strict=True):
            if order.action == "rollback" and outcome.ok:
                self._rollbacks.append((self._now, outcome.detail))
                self._healthy = 0
                self._last_checkpoint = self._now
            elif order.action == "rollback" and not any(o.action == "halt" for o in orders):
                follow.append(Order("halt", None, order.rule, f"the rollback failed: {outcome.detail}"))
            elif order.action == "halt":
                self.halted = order.reason
            elif order.action == "checkpoint_now":
                self._last_checkpoint = self._now
            elif order.action == "checkpoint_more_often" and order.target is not None and self._interval:
                self._interval = max(1, round(self._policy.checkpoint_every / order.target))
            elif order.action in KNOB_ACTIONS:
                self._note_dose(order, outcome, ranks.get(order.rule, 1), {} if restored else values)
        return follow

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "now": self._now, "healthy": self._healthy, "patience": self._patience, "lifted": sorted(self._lifted),
            "locked": {k: list(v) for k, v in self._locked.items()}, "rollbacks": [list(r) for r in self._rollbacks],
            "interval": self._interval, "last_checkpoint": self._last_checkpoint,
            "doses": {k: list(v) for k, v in self.doses.items()}, "halted": self.halted,
            "once": sorted(self._once),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._now, self._healthy, self._patience = state["now"], state["healthy"], state["patience"]
        self._lifted, self._once, self.halted = set(state["lifted"]), set(state["once"]), state["halted"]
        self._locked = {k: (v[0], v[1]) for k, v in state["locked"].items()}
        self._rollbacks = [(r[0], r[1]) for r in state["rollbacks"]]
        self._interval, self._last_checkpoint = state["interval"], state["last_checkpoint"]
        self.doses = {k: Dose(*v) for k, v in state["doses"].items()}

    def take_over(self, state: Mapping[str, Any]) -> list[str]:
        """Take an earlier session's plan: its doses stay due, its budget and its checkpoints start afresh.

        Returns:
            What of it cannot be taken over.
        """
        afresh = {"halted": "", "rollbacks": [], "healthy": 0, "interval": self._interval}
        self.load_state_dict({**state, **afresh, "last_checkpoint": state["now"] - self._interval})
        lost = [name for name in self.doses if KNOB_ACTIONS[name].knob not in self._bases]
        for name in lost:
            del self.doses[name]
        return [f"{name} was in force, but there is no {KNOB_ACTIONS[name].knob} knob any more" for name in lost]

    def resume_orders(self) -> list[Order]:
        """Return the orders that put the doses in force back onto a trainer that was started anew."""
        return [Order(name, d.limit, d.rule, "in force when the run was resumed") for name, d in self.doses.items()]

    def _order(self, name: str, want: Want) -> Order | None:
        if name == "rollback":
            return None
        action = KNOB_ACTIONS.get(name)
        if action is None:  # done once each time that a rule reaches a level, not on every step that it stays there
            key = f"{want.rule}/{want.rank}/{name}"
            fresh = key not in self._once
            self._once.add(key)
            return Order(name, want.target, want.rule, want.reason) if fresh else None
        if action.knob not in self._bases:
            return None
        scaled = self._policy.targets == "scaled"
        limit = self._book.limit(name, want.target, self._bases[action.knob], scaled=scaled)
        held = self.doses.get(name)
        if held is not None and action.merge(held.limit, limit) == held.limit:
            return None
        until, rank = self._locked.get(name, (0, 0))
        if self._now < until and want.rank <= rank:
            return None
        return Order(name, limit, want.rule, want.reason)

    def _diverged(self, want: Want, ledger: Ledger) -> list[Order]:
        """Return the rollback, or the halt where there is nothing to roll back to, no budget, or no wish."""
        used, budget = len(self._rollbacks), self._policy.rollback_budget
        newest = tuple(c.id for c in ledger.choices())
        last = self._rollbacks[-1] if self._rollbacks else None
        again = last is not None and self._now - last[0] <= self._policy.recur_within
        if again and last and newest and newest[0] <= last[1]:  # nothing was proven since: that checkpoint failed
            deeper = tuple(c.id for c in ledger.choices(before=last[1]))
        else:
            deeper = newest
        if self._policy.on_divergence == "halt":
            why = "on_divergence is halt"
        elif not newest:
            why = "no checkpoint is proven yet" if self._restorable else "this trainer offers no checkpoints"
        elif used >= budget:
            why = f"all {budget} rollbacks of the budget are used"
        elif not deeper:
            after = self._now - (last[0] if last else 0)
            why = f"trouble came back {after} observations after a rollback and no older checkpoint is proven"
        else:
            return [Order("rollback", None, want.rule, want.reason, checkpoints=deeper)]
        restore = [Order("rollback", None, want.rule, "the state to halt in", checkpoints=newest)] if newest else []
        return [*restore, Order("halt", None, want.rule, f"{want.reason}; {why}")]

    def _recovery(self) -> list[Order]:
        """Return the releases that are due; a release that failed is tried again after the cool-down."""
        if self._healthy < self._policy.recover_after * self._patience:
            return []
        self._interval = self._policy.checkpoint_every
        why = f"healthy for {self._healthy} observations"
        due = [name for name in self.doses if self._now >= self._locked.get(name, (0, 0))[0]]
        return [Order(name, None, self.doses[name].rule, why, release=True) for name in due]

    def _due_checkpoint(self, ledger: Ledger) -> list[Order]:
        if not self._interval or not self._restorable or self._now - self._last_checkpoint < self._interval:
            return []
        if ledger.waiting() > self._policy.keep:  # enough wait for their probation: a disk is not endless
            return []
        return [Order("checkpoint_now", None, "schedule", f"every {self._interval} observations")]

    def _effects(self, values: Mapping[str, float]) -> tuple[list[Effect], list[Order]]:
        """Look at doses that have had their time; take a KL dose back where the KL did not fall (reading 9)."""
        effects, orders = [], []
        for name, dose in list(self.doses.items()):
            after = values.get(dose.metric)
            if dose.judged or self._now - dose.given < self._policy.effect_within or after is None:
                continue
            self.doses[name] = dose._replace(judged=True)
            helped = abs(after) < dose.value or (math.isfinite(after) and not math.isfinite(dose.value))
            effects.append(Effect(name, dose.rule, dose.metric, dose.value, abs(after), helped))
            if name == "raise_kl_coef" and not helped:
                self._locked[name] = (self._now + self._policy.cooldown, dose.rank)
                fell = f"|{dose.metric}| did not fall ({dose.value:.4g} to {abs(after):.4g})"
                why = f"{fell} in {self._policy.effect_within} observations"
                orders.append(Order(name, None, dose.rule, why, release=True))
        return effects, orders

    def _note_dose(self, order: Order, outcome: Outcome, rank: int, values: Mapping[str, float]) -> None:
        taken = outcome.ok or (not order.release and outcome.after is not None)  # held, though it reads otherwise
        if not taken:
            self._locked[order.action] = (self._now + max(1, self._policy.cooldown), rank)
        elif order.release:
            self.doses.pop(order.action, None)
            if self._healthy >= self._policy.recover_after * self._patience:
                self._lifted.add(order.action)
        elif order.target is not None:
            if order.action in self._lifted:  # it was let go too early: be slower next time
                self._lifted.clear()
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            metric = next((m for m in _WATCHED_FOR_EFFECT if m in values), "")
            size = abs(values[metric]) if metric else 0.0
            self.doses[order.action] = Dose(order.target, order.rule, rank, self._now, metric, size)
