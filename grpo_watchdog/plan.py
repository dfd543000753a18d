"""Plan: incidents become orders, the smallest safe dose within budgets. It decides and never acts.

All counts are observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_watchdog.actions import ACTIONS, KNOB_ACTIONS, WATCHFUL, Order, Outcome
from grpo_watchdog.checkpoints import Ledger
from grpo_watchdog.dosage import Dosage
from grpo_watchdog.dose import Dose, Effect, Want, wanted
from grpo_watchdog.ladder import Ladder
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding

_TURN = {name: turn for turn, name in enumerate(ACTIONS)}


class Planner:
    """Keeps the doses in force and the healthy streak; the ladder keeps the rollbacks.

    Args:
        book: the rulebook, its policy included.
        bases: what each knob was set to at attach; a knob that is not there cannot be dosed.
        restorable: whether checkpoints can be taken and restored.
    """

    def __init__(self, book: Rulebook, bases: Mapping[str, float], *, restorable: bool) -> None:
        """Start with nothing in force."""
        self._book, self._policy = book, book.policy
        self._bases, self._restorable = dict(bases), restorable
        self._ladder = Ladder(book.policy, bases, restorable=restorable)
        levels = [
            (rule_id, rank, level)
            for rule_id, rule in book.rules.items()
            for rank, level in enumerate(rule.ladder, start=1)
        ]
        self._dosing = {(rule_id, rank) for rule_id, rank, level in levels if set(level.do) - WATCHFUL}
        self._hints = any(
            level.do and (level.severity == "notice" or not set(level.do) - WATCHFUL) for _, _, level in levels
        )
        self._asks = {(rule_id, rank) for rule_id, rank, level in levels if level.do}
        self._now = 0
        self._healthy = 0
        self._dosage = Dosage(book, bases)
        self._muted: dict[str, int] = {}  # rule -> rank up to which it was answered without anything being done
        self._partly: set[str] = set()  # rules of whose orders some were carried out and others held back
        self._lived: set[str] = set()  # of the muted: those that came back and did no harm
        self._once: set[str] = set()  # "rule/rank/action" of what was done once and is not done again
        self._interval = self._policy.checkpoint_every
        self._last_checkpoint = -self._interval  # the first one is due at once
        self.paused = ""  # the rule for which the optimizer's steps are skipped
        self.halted = ""

    @property
    def doses(self) -> dict[str, Dose]:
        """Return the limits in force, by action."""
        return self._dosage.doses

    def plan(
        self, findings: Sequence[Finding], values: Mapping[str, float], ledger: Ledger
    ) -> tuple[list[Order], list[Effect]]:
        """Return what to do now, in the order in which to do it, and which earlier doses helped."""
        self._now += 1
        healthy = self.healthy(findings)
        self._healthy = self._healthy + 1 if healthy else 0
        if self._policy.ladder:
            self._ladder.saw(values)
        if self._once or self._muted or self._partly:
            self._forget({f.rule for f in findings})
        if self.halted:
            return [], []
        if healthy and not self.doses and not self.paused and not self._asked(findings):
            ledger.shorten(1.0)
            if self._hints and findings and self._dosage.healthy_for(self._healthy):
                self._interval = self._policy.checkpoint_every
            return self._due_checkpoint(ledger), []
        wants = wanted(self._book, self._asking(findings))
        effects, orders, failed = self._dosage.effects(values, {f.rule for f in findings}, self._now)
        if failed is not None:
            wants.setdefault("escalate", failed)
        ledger.shorten(wants["shorten_probation"].target if "shorten_probation" in wants else 1.0)
        orders += self._back(wants, findings, ledger)
        orders += [o for name in ACTIONS if name in wants and (o := self._order(name, wants[name])) is not None]
        if self.paused and "pause" not in wants and self.paused not in self._partly:
            orders.append(Order("pause", None, self.paused, f"{self.paused} is over", release=True))
        if healthy:
            orders += self._in_health(values, ledger)
        return _in_turn(orders), effects

    def _asked(self, findings: Sequence[Finding]) -> bool:
        """Return whether any finding may ask for something."""
        return any((finding.rule, finding.rank) in self._asks for finding in findings)

    def _asking(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return the findings that may ask for something; what is only reported explains nothing away."""
        muted = self._muted
        quiet = {*self._policy.shadow, *(f.rule for f in findings if f.rank <= muted.get(f.rule, 0))}
        loud = [f for f in findings if f.rank > muted.get(f.rule, 0)]
        return [f._replace(inhibited_by="") if f.inhibited_by in quiet else f for f in loud] if quiet else loud

    def healthy(self, findings: Sequence[Finding]) -> bool:
        """Return whether nothing fires that asks for a dose or is critical.

        A warning without a dose (a range in the document's units, say), and one that nothing corroborates, is
        reported, but it neither holds up checkpoints nor keeps doses in force: it may stand for a whole healthy run.
        """
        if not findings or findings[0].severity == "notice":  # worst first
            return True
        return not any(
            f.severity == "critical" or (f.severity == "warning" and not f.alone and (f.rule, f.rank) in self._dosing)
            for f in findings
            if f.rule not in self._lived or f.rank > self._muted.get(f.rule, 0)
        )

    def settle(self, orders: Sequence[Order], outcomes: Sequence[Outcome], findings: Sequence[Finding],
               values: Mapping[str, float]) -> list[Order]:  # fmt: skip
        """Learn what became of the orders; return what must follow from it (a halt where a rollback failed)."""
        ranks = {f.rule: f.rank for f in findings}
        restored = any(o.action == "rollback" and o.ok and not o.held_back for o in outcomes)
        answered = {o.rule for o, outcome in zip(orders, outcomes, strict=True) if not outcome.held_back}
        follow: list[Order] = []
        for order, outcome in zip(orders, outcomes, strict=True):
            rank = ranks.get(order.rule, 1)
            if outcome.held_back:
                if order.rule in answered or any(dose.rule == order.rule for dose in self.doses.values()):
                    self._partly.add(order.rule)
                if order.action == "checkpoint_now":
                    self._last_checkpoint = self._now
                if not restored:  # after a rollback everything begins anew
                    self._muted[order.rule] = max(rank, self._muted.get(order.rule, 0))
                continue
            if not order.release and order.action not in KNOB_ACTIONS and not (order.action == "pause" and outcome.ok):
                self._once.add(f"{order.rule}/{rank}/{order.action}")
            if order.rung >= 0:
                self._ladder.climbed(order, self._now, restored=restored)
            if order.action in KNOB_ACTIONS:
                seen = {} if restored else values
                self._dosage.note(order, outcome, rank, seen, now=self._now, streak=self._healthy)
            elif order.action == "rollback" and not outcome.ok and not any(o.action == "halt" for o in orders):
                follow.append(Order("halt", None, order.rule, f"the rollback failed: {outcome.detail}"))
            else:
                self._note(order, outcome)
        return follow

    def _note(self, order: Order, outcome: Outcome) -> None:
        """Learn what became of an order that is not for a knob."""
        match order.action:
            case "rollback" if outcome.ok:
                self._ladder.rolled_back(self._now, outcome.detail)
                self._healthy = 0
                self._last_checkpoint = self._now
            case "halt":
                self.halted = order.reason
            case "pause" if outcome.ok:
                self.paused = "" if order.release else order.rule
            case "checkpoint_now":
                self._last_checkpoint = self._now
            case "checkpoint_more_often" if order.target is not None and self._interval:
                self._interval = max(1, round(self._policy.checkpoint_every / order.target))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            **self._dosage.state_dict(),
            "now": self._now,
            "healthy": self._healthy,
            "ladder": self._ladder.state_dict(),
            "interval": self._interval,
            "last_checkpoint": self._last_checkpoint,
            "halted": self.halted,
            "once": sorted(self._once),
            "muted": dict(self._muted),
            "partly": sorted(self._partly),
            "lived": sorted(self._lived),
            "paused": self.paused,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._now, self._healthy, self.halted = state["now"], state["healthy"], state["halted"]
        self._once, self._partly, self._lived = set(state["once"]), set(state["partly"]), set(state["lived"])
        self._dosage.load_state_dict(state)
        self._muted, self.paused = dict(state["muted"]), state["paused"]
        self._ladder.load_state_dict(state["ladder"])
        self._interval, self._last_checkpoint = state["interval"], state["last_checkpoint"]

    def take_over(self, state: Mapping[str, Any]) -> list[str]:
        """Take an earlier session's plan: its doses stay due, its budget and its checkpoints start afresh.

        Returns:
            What of it cannot be taken over.
        """
        foot = Ladder(self._policy, self._bases, restorable=self._restorable).state_dict()
        afresh = {"halted": "", "ladder": foot, "healthy": 0, "interval": self._interval, "muted": {}, "partly": [],
                  "lived": [], "paused": ""}  # fmt: skip
        self.load_state_dict({**state, **afresh, "last_checkpoint": state["now"] - self._interval})
        for name, dose in list(
            self.doses.items()
        ):  # given to a state that is gone: there is nothing to hold it against
            self.doses[name] = dose._replace(judged=True)
        lost = [name for name in self.doses if KNOB_ACTIONS[name].knob not in self._bases]
        for name in lost:
            del self.doses[name]
        return [f"{name} was in force, but there is no {KNOB_ACTIONS[name].knob} knob any more" for name in lost]

    def resume_orders(self) -> list[Order]:
        """Return the orders that put the doses in force back onto a trainer that was started anew."""
        why = "in force when the run was resumed"
        doses = [Order(name, d.limit, d.rule, why) for name, d in self.doses.items()]
        return [*doses, Order("pause", None, self.paused, why)] if self.paused else doses

    def expect(self, metrics: Sequence[str]) -> list[Order]:
        """Return the releases of limits on settings that somebody changes on purpose."""
        return [
            Order(name, None, dose.rule, "the setting changes on purpose", release=True)
            for name, dose in self.doses.items()
            if {KNOB_ACTIONS[name].knob, f"{KNOB_ACTIONS[name].knob}_set"} & set(metrics)
        ]

    def _forget(self, firing: set[str]) -> None:
        """Forget what was said of rules that do not fire any more."""
        self._once = {key for key in self._once if key.split("/")[0] in firing}
        self._muted = {rule: rank for rule, rank in self._muted.items() if rule in firing}
        self._partly &= firing
        self._lived &= firing

    def _order(self, name: str, want: Want) -> Order | None:
        """Return the order for what rules want of an action, or None where there is nothing to do, or not again."""
        if name in ("rollback", "escalate") or (name == "pause" and self.paused):
            return None  # the first two are the ladder's
        if name in KNOB_ACTIONS:
            return self._dosage.order(name, want, self._now)
        if f"{want.rule}/{want.rank}/{name}" in self._once:
            return None  # done once each time that a rule reaches a level, not on every step that it stays there
        return Order(name, want.target, want.rule, want.reason)

    def _back(self, wants: Mapping[str, Want], findings: Sequence[Finding], ledger: Ledger) -> list[Order]:
        """Return what the ladder says to a rule that escalates, or that asks for a rollback as the document does."""
        want = wants.get("escalate")
        if want is not None:
            harm = self._policy.harm
            harmed = not harm or any(f.rule in harm and not f.alone for f in findings)
            if harmed or self._ladder.at_foot(self._now):
                return self._ladder.climb(want, ledger, self._now, self.doses)
            self._muted[want.rule] = want.rank  # it came back and does no harm: from now on it is only reported
            self._lived.add(want.rule)
        return self._ladder.diverged(wants["rollback"], ledger, self._now) if "rollback" in wants else []

    def _in_health(self, values: Mapping[str, float], ledger: Ledger) -> list[Order]:
        """Return what a healthy run is due: limits let up, and a checkpoint."""
        orders: list[Order] = []
        if self._dosage.healthy_for(self._healthy):
            self._interval = self._policy.checkpoint_every
            orders = self._dosage.recovery(values, self._healthy, self._now)
        return orders + self._due_checkpoint(ledger)

    def _due_checkpoint(self, ledger: Ledger) -> list[Order]:
        if not self._interval or not self._restorable or self._now - self._last_checkpoint < self._interval:
            return []
        if ledger.waiting() > self._policy.keep:  # enough wait for their probation: a disk is not endless
            return []
        return [Order("checkpoint_now", None, "schedule", f"every {self._interval} observations")]


def _in_turn(orders: list[Order]) -> list[Order]:
    """Return orders in the order in which they are carried out; of several for one knob the safest."""
    kept: dict[tuple[str, bool], Order] = {}
    for order in orders:
        action, key = KNOB_ACTIONS.get(order.action), (order.action, order.release)
        old = kept.get(key)
        if old is not None and (action is None or order.target is None or old.target is None):
            continue
        if old is None or (action is not None and action.merge(old.target or 0.0, order.target or 0.0) != old.target):
            kept[key] = order
    return sorted(kept.values(), key=lambda order: _TURN[order.action])
