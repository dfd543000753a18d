"""Verdict: step -> findings -> incidents -> orders -> outcomes, in that order.

The judge decides from what it is shown and nothing else: the same steps and outcomes give the same decisions, byte
for byte, whether they come from a trainer or from a journal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_watchdog import briefing, journal
from grpo_watchdog.actions import Order, Outcome
from grpo_watchdog.actuation import Actuator
from grpo_watchdog.approval import Approvals, refused
from grpo_watchdog.checkpoints import Ledger
from grpo_watchdog.controls import Check
from grpo_watchdog.diagnosis import Diagnosis, Incident
from grpo_watchdog.findings import Blind, Findings
from grpo_watchdog.metrics import Intake, Step
from grpo_watchdog.plan import Planner
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding

_log = logging.getLogger("grpo_watchdog")
_LOUD = frozenset({"warning", "critical"})
_BLIND_EVERY = 100  # observations between looks at what cannot be seen


class Verdict(NamedTuple):
    """What one observation came to.

    Attributes:
        step: the step number that was given.
        level: ok, notice, warning or critical: the worst that fires.
        incidents: what is wrong, each with its root, evidence and likely causes; empty below a warning.
        actions: what was done on this step, read back.
        halt: whether the loop should break. Stays True once it is.
        rolled_back_to: the step whose state was restored on this step, or None.
        findings: every rule that fires, symptoms and notices included.
        notices: what was said for the first time on this step.
    """

    step: int
    level: str
    incidents: tuple[Incident, ...] = ()
    actions: tuple[Outcome, ...] = ()
    halt: bool = False
    rolled_back_to: int | None = None
    findings: tuple[Finding, ...] = ()
    notices: tuple[str, ...] = ()


class Judge:
    """Everything that the watchdog remembers, and the order in which it thinks.

    Args:
        book: the rulebook, its policy included.
        actuator: the side that touches the trainer, or plays a journal back.
        sink: where every entry goes.
        intake: what turns raw metrics into steps.
        bases: what each knob was set to at attach.
        restorable: whether checkpoints can be taken and restored.
        log: where interventions and notices are said.
    """

    def __init__(
        self,
        book: Rulebook,
        actuator: Actuator,
        sink: journal.Journal,
        *,
        intake: Intake,
        bases: Mapping[str, float],
        restorable: bool,
        log: logging.Logger = _log,
    ) -> None:
        """Start with nothing seen."""
        self._log = log
        self._check_every = book.policy.check_every
        self.approvals = Approvals(book.policy, actuator, sink)
        self._actuator, self._journal = actuator, sink
        self.intake = intake
        self.findings = Findings(book)
        self.diagnosis = Diagnosis(book, bases)
        self.ledger = Ledger(book.policy.probation, book.policy.keep)
        self.planner = Planner(book, bases, restorable=restorable)
        self._ticks = 0
        self._level = "ok"
        self._checks: list[Check] = []
        self._said_checks: set[str] = set()
        self._said_notices: set[str] = set()
        self._seen: tuple[Finding, ...] = ()
        self._book = book
        self._blind: tuple[Blind, ...] = ()

    def judge(self, seen: Step, notices: list[str]) -> Verdict:
        """Decide one step, have it carried out, and return the verdict."""
        number, values = seen
        scheduled = bool(self._check_every) and self._ticks % self._check_every == 0
        if scheduled:
            values.update(self._actuator.measure())
        self._ticks += 1
        self._journal.append({"kind": "step", "step": number, "values": values}, flush=False)
        findings = self.findings.detect(seen)
        level = findings[0].severity if findings else "ok"
        if scheduled or (level in _LOUD and RANK[level] > RANK[self._level]):
            notices += self.inspect(number)
        outcomes = self._read_back(number)
        record = self._diagnose(findings, seen) if level in _LOUD or self.diagnosis.open else {}
        incidents = tuple(self.diagnosis.open.values())
        proven, gone = self.ledger.tick(healthy=self.planner.healthy(findings))
        orders, effects = self.planner.plan(findings, values, self.ledger)
        orders, declined = self.approvals.sift(orders, findings, number)
        if record or orders or effects or proven or gone or level != self._level:
            record |= {"orders": orders, "effects": effects, "proven": proven, "gone": gone}
            self._journal.append({"kind": "decision", "step": number, "level": level, **record})
            self._actuator.settle_checkpoints(proven, gone)
        hints: list[str] = []
        if findings is not self._seen:
            self._seen = findings
            hints = self._first_time(findings)
            self.note(number, hints, level=logging.INFO)
        self._level = level
        if orders or declined:
            outcomes += self._carry_out(orders, declined, seen, findings)
        if self._ticks == 1 or self._ticks % _BLIND_EVERY == 0:
            self.note_blind(number)
        if notices:
            self.note(number, notices)
            level = "notice" if level == "ok" else level
        back = _restored(outcomes) if outcomes else None
        halt = bool(self.planner.halted)
        return Verdict(number, level, incidents, tuple(outcomes), halt, back, findings, (*notices, *hints))

    def _diagnose(self, findings: Sequence[Finding], seen: Step) -> dict[str, Any]:
        """Bring the incidents up to date; return what of it goes into the journal."""
        opened, closed = self.diagnosis.diagnose(findings, seen.values, self._checks, seen.number)
        for incident in opened:
            self._log.warning("step %s: %s", seen.number, briefing.headline(incident, self._book))
        return {"opened": opened, "closed": closed} if opened or closed else {}

    def checkpoint(self, step: int) -> Outcome:
        """Take a checkpoint because the loop asks for it."""
        order = Order("checkpoint_now", None, "call", "asked for by the loop")
        self._journal.append({"kind": "call", "step": step, "call": "checkpoint"})
        outcome = self._actuator.execute(order, step)
        self._learn([outcome])
        self.planner.settle([order], [outcome], (), {})
        return outcome

    def expect(self, metrics: Sequence[str]) -> None:
        """Learn that these metrics change on purpose now; limits held on such a setting are let go."""
        self._journal.append({"kind": "call", "step": self.intake.last, "call": "expect", "metrics": list(metrics)})
        self.findings.expect(metrics)
        self._actuator.expect(metrics)
        releases = self.planner.expect(metrics)
        outcomes = [self._actuator.execute(order, self.intake.last) for order in releases]
        self._learn(outcomes)
        self.planner.settle(releases, outcomes, (), {})

    def inspect(self, number: int | None) -> list[str]:
        """Look at the model; return what failed and was not said before."""
        self._checks = self._actuator.inspect()
        if self._checks:
            self._journal.append({"kind": "check", "step": number, "checks": self._checks})
        failed = [f"model check {c.name}: {c.detail}" for c in self._checks if c.passed is False]
        fresh = [text for text in failed if text not in self._said_checks]
        self._said_checks.update(fresh)
        return fresh

    def _first_time(self, findings: Sequence[Finding]) -> list[str]:
        """Return what rules at the level of a notice say, once each."""
        fresh = [
            f for f in findings if f.severity == "notice" and not f.inhibited_by and f.rule not in self._said_notices
        ]
        self._said_notices.update(f.rule for f in fresh)
        return [briefing.finding(f, self._book) for f in fresh]

    def note(self, number: int | None, notices: Sequence[str], level: int = logging.WARNING) -> None:
        """Write notices to the journal and the log."""
        for text in notices:
            self._journal.append({"kind": "notice", "step": number, "text": text})
            self._log.log(level, "%s", text)

    def note_blind(self, number: int | None) -> None:
        """Write what cannot be seen, where it changed."""
        blind = self.findings.blind()
        if blind != self._blind:
            self._blind = blind
            self._journal.append({"kind": "blind", "step": number, "rules": blind})

    def note_state(self) -> None:
        """Write what a later session goes on from."""
        proven = [checkpoint.step for checkpoint in self.ledger.proven()]
        self._journal.append({"kind": "state", "planner": self.planner.state_dict(), "proven": proven})

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is remembered, as JSON-able values."""
        return {
            "findings": self.findings.state_dict(),
            "diagnosis": self.diagnosis.state_dict(),
            "ledger": self.ledger.state_dict(),
            "planner": self.planner.state_dict(),
            "intake": self.intake.state_dict(),
            "ticks": self._ticks,
            "level": self._level,
            "checks": [list(c) for c in self._checks],
            "said_checks": sorted(self._said_checks),
            "said_notices": sorted(self._said_notices),
            "approvals": self.approvals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.findings.load_state_dict(state["findings"])
        self.diagnosis.load_state_dict(state["diagnosis"])
        self.ledger.load_state_dict(state["ledger"])
        self.planner.load_state_dict(state["planner"])
        self.intake.load_state_dict(state["intake"])
        self._ticks, self._level = state["ticks"], state["level"]
        self._checks = [Check(*c) for c in state["checks"]]
        self._said_checks, self._said_notices = set(state["said_checks"]), set(state["said_notices"])
        self.approvals.load_state_dict(state["approvals"])

    def _carry_out(
        self, orders: Sequence[Order], declined: Sequence[Order], seen: Step, findings: Sequence[Finding]
    ) -> list[Outcome]:
        """Execute, learn from the outcomes, and execute what follows from them."""
        done = [refused(order, seen.number) for order in declined]
        self._learn(done)
        self.planner.settle(declined, done, findings, seen.values)
        interrupted: BaseException | None = None
        while orders:
            outcomes, interrupted = self._execute(orders, seen.number, interrupted)
            self._learn(outcomes)
            done += outcomes
            orders = self.planner.settle(orders, outcomes, findings, seen.values)
            if self._book.policy.mode == "approve":
                break  # what follows was not asked
        if any(outcome.action != "checkpoint_now" for outcome in done):
            self.note_state()
        if self.planner.halted:
            self.note_blind(seen.number)
        if interrupted is not None:
            raise interrupted
        return done

    def _execute(
        self, orders: Sequence[Order], step: int, interrupted: BaseException | None
    ) -> tuple[list[Outcome], BaseException | None]:
        """Carry orders out one by one; after a Ctrl-C (in a notebook, say) the rest is written down as not done."""
        outcomes: list[Outcome] = []
        for order in orders:
            if interrupted is None:
                try:
                    outcomes.append(self._actuator.execute(order, step))
                    continue
                except BaseException as error:  # noqa: BLE001 - raised again once everything is written down
                    interrupted = error
            what = f"interrupted: {type(interrupted).__name__}"
            outcomes.append(Outcome(step, order.action, None, None, order.rule, order.reason, ok=False, detail=what))
        return outcomes, interrupted

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes down, and bring the watchdog's own state in line with the trainer's."""
        for outcome in outcomes:
            self._journal.append({"kind": "outcome", **outcome.as_json()})
            quiet = outcome.ok and outcome.action == "checkpoint_now"
            self._log.log(logging.DEBUG if quiet else logging.WARNING, "%s", briefing.sentence(outcome))
            if outcome.action == "checkpoint_now" and outcome.ok and not outcome.held_back:
                self.ledger.add(outcome.detail, outcome.step, self.findings.state_dict())
            elif outcome.action == "rollback" and outcome.ok and not outcome.held_back and outcome.after is not None:
                self._rolled_back(outcome.detail, int(outcome.after))

    def _rolled_back(self, checkpoint: str, step: int) -> None:
        place = next(i for i, c in enumerate(self.ledger.entries) if c.id == checkpoint)
        target = self.ledger.entries[place]
        newer = [c.id for c in self.ledger.entries[place + 1 :]]  # damaged, unproven, or trouble came back
        self.ledger.drop(newer)
        self._actuator.settle_checkpoints([], newer)
        self.findings.load_state_dict(target.memory)
        self._checks = []  # they were of the state that is gone
        self.intake.rewind(step)

    def _read_back(self, number: int) -> list[Outcome]:
        doses = self.planner.doses
        outcomes = self._actuator.check({name: dose.rule for name, dose in doses.items()} if doses else {}, number)
        for outcome in outcomes:
            self._journal.append({"kind": "held", **outcome.as_json()})
            self._log.warning("%s", briefing.sentence(outcome))
        return outcomes


def _restored(outcomes: Sequence[Outcome]) -> int | None:
    """Return the step that was rolled back to, or None."""
    done = (o for o in outcomes if o.action == "rollback" and o.ok and not o.held_back)
    return next((int(o.after) for o in done if o.after is not None), None)
