"""Plan: incidents become orders, the smallest safe dose within budgets. It decides and never acts.

Doses are limits (a ceiling for the learning rate and the clip, a floor for the KL coefficient), so giving
one twice changes nothing and several merge into the safest. All counts are observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_watchdog.actions import ACTIONS, KNOB_ACTIONS, Order, Outcome
from grpo_watchdog.checkpoints import Ledger
from grpo_watchdog.findings import Finding
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook

_WATCHED_FOR_EFFECT = ("kl", "kl_penalty", "log_ratio")
_MOST_PATIENCE = 64
_TURN = {name: turn for turn, name in enumerate(ACTIONS)}


class Dose(NamedTuple):
    """A limit in force.

    Attributes:
        limit: the ceiling or floor.
        rule: the rule that asked for it.
        rank: the level of the rule that asked for it.
        given: the observation at which it was given.
        metric: what must shrink for it to have helped, or "".
        value: the size of that metric when it was given.
    """

    limit: float
    rule: str
    rank: int
    given: int
    metric: str
    value: float


class Effect(NamedTuple):
    """Whether a dose helped, some observations later."""

    action: str
    rule: str
    metric: str
    before: float
    after: float
    helped: bool


class Want(NamedTuple):
    """What the firing rules ask of one action, merged."""

    target: float
    rule: str
    rank: int
    reason: str


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
        loud = bool(findings) and RANK[findings[0].severity] >= RANK["warning"]
        self._healthy = 0 if loud else self._healthy + 1
        if self.halted:
            return [], []
        acting = bool(findings) and any((f.rule, f.rank) in self._dosing for f in findings)
        if not (acting or loud or self.doses):
            return self._due_checkpoint(), []
        effects, orders = self._effects(values)
        wants = wanted(self._book, findings)
        self._once = {key for key in self._once if key.split("/")[0] in {f.rule for f in findings}}
        if "rollback" in wants:
            orders += self._diverged(wants["rollback"], ledger)
        orders += [o for name in ACTIONS if name in wants and (o := self._order(name, wants[name])) is not None]
        if not loud and self.doses and self._healthy >= self._policy.recover_after * self._patience:
            why = f"healthy for {self._healthy} observations"
            orders += [Order(name, None, dose.rule, why, release=True) for name, dose in self.doses.items()]
        if not loud and not orders:
            orders = self._due_checkpoint()
        orders.sort(key=lambda order: _TURN[order.action])
        return orders, effects

    def settle(self, orders: Sequence[Order], outcomes: Sequence[Outcome], findings: Sequence[Finding],
               values: Mapping[str, float]) -> list[Order]:  # fmt: skip
        """Learn what became of the orders; return what must follow from it (a halt where a rollback failed)."""
        ranks = {f.rule: f.rank for f in findings}
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
                self._note_dose(order, outcome, ranks.get(order.rule, 1), values)
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
        deeper = tuple(c.id for c in ledger.choices(before=last[1])) if again and last else newest
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

    def _due_checkpoint(self) -> list[Order]:
        if not self._interval or not self._restorable or self._healthy < 1:
            return []
        if self._now - self._last_checkpoint < self._interval:
            return []
        return [Order("checkpoint_now", None, "schedule", f"every {self._interval} observations")]

    def _effects(self, values: Mapping[str, float]) -> tuple[list[Effect], list[Order]]:
        """Look at doses that have had their time; take a KL dose back where the KL did not fall (reading 9)."""
        effects, orders = [], []
        for name, dose in self.doses.items():
            after = values.get(dose.metric)
            if self._now - dose.given != self._policy.effect_within or after is None:
                continue
            helped = abs(after) < dose.value or (math.isfinite(after) and not math.isfinite(dose.value))
            effects.append(Effect(name, dose.rule, dose.metric, dose.value, abs(after), helped))
            if name == "raise_kl_coef" and not helped:
                self._locked[name] = (self._now + self._policy.cooldown, dose.rank)
                fell = f"|{dose.metric}| did not fall ({dose.value:.4g} to {abs(after):.4g})"
                why = f"{fell} in {self._policy.effect_within} observations"
                orders.append(Order(name, None, dose.rule, why, release=True))
        return effects, orders

    def _note_dose(self, order: Order, outcome: Outcome, rank: int, values: Mapping[str, float]) -> None:
        if order.release and outcome.ok:
            self.doses.pop(order.action, None)
            if self._healthy >= self._policy.recover_after * self._patience:
                self._lifted.add(order.action)
        elif not order.release and outcome.ok and order.target is not None:
            if order.action in self._lifted:  # it was let go too early: be slower next time
                self._lifted.clear()
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
            metric = next((m for m in _WATCHED_FOR_EFFECT if m in values), "")
            size = abs(values[metric]) if metric else 0.0
            self.doses[order.action] = Dose(order.target, order.rule, rank, self._now, metric, size)


def wanted(book: Rulebook, findings: Sequence[Finding]) -> dict[str, Want]:
    """Return what all firing rules together ask of each action: the safest of each; symptoms ask for nothing."""
    wants: dict[str, Want] = {}
    for finding in findings:
        if finding.inhibited_by:
            continue
        reason = _reason(finding)
        for name, target in book.rules[finding.rule].ladder[finding.rank - 1].do.items():
            new = Want(float(target), finding.rule, finding.rank, reason)
            old = wants.get(name)
            if old is None or ACTIONS[name].merge(old.target, new.target) != old.target:
                wants[name] = new
    return wants


def _reason(finding: Finding) -> str:
    limit = "" if finding.limit is None else f" against {finding.limit:g}"
    return f"{finding.metric} {finding.value:.6g}{limit}" + (f" ({finding.note})" if finding.note else "")
