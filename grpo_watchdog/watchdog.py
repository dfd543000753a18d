"""Watchdog: step -> findings -> incidents -> orders -> outcomes, in that order, and nothing raises out of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, get_args

from pydantic import ValidationError

from grpo_watchdog import briefing, journal
from grpo_watchdog.actions import Order, Outcome
from grpo_watchdog.actuation import Actuation, Actuator
from grpo_watchdog.checkpoints import Ledger, Vault
from grpo_watchdog.controls import Check, Controls, NoControls
from grpo_watchdog.diagnosis import Diagnosis, Incident
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.findings import Blind, Finding, Findings
from grpo_watchdog.metrics import Intake, RatioTo, Step
from grpo_watchdog.plan import Planner
from grpo_watchdog.rule import RANK, SEVERITIES
from grpo_watchdog.rulebook import Policy, Rulebook, from_json, load

_log = logging.getLogger("grpo_watchdog")
_BLIND_EVERY = 100


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


Listener = Callable[[Step, Verdict], None]


class Watchdog:
    """Watches one run. `grpo_watchdog.attach` makes one for a trainer; this is the same under the hook.

    Args:
        rules: a rulebook: a name, a path or a loaded one.
        controls: what the trainer lets be turned, saved and restored; None only watches.
        run_dir: where the journal and the checkpoints go; None keeps neither, and then there is no rollback.
        ratio_to: the policy that the trainer's surrogate ratio is taken to, "reference" or "old".
        dims: dimensions or tokens that a trajectory's log-prob is summed over, where known.
        resume: go on in a run_dir that already holds a run: its doses are put back in force, its proven checkpoints are
            known; the newest one is restored.
        listeners: called after every observation with the step and the verdict.
        **policy: any field of the rulebook's policy: on_divergence, checkpoint_every, probation, recover_after,
            rollback_budget, targets ...

    Raises:
        ConfigurationError: an option is unknown or out of range, or run_dir already holds a run.
        RulebookError: the rulebook cannot be used.
    """

    def __init__(
        self,
        rules: str | Path | Rulebook = "documented",
        controls: Controls | None = None,
        run_dir: str | Path | None = None,
        *,
        ratio_to: RatioTo = "reference",
        dims: int | None = None,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        **policy: Any,
    ) -> None:
        """Read the rulebook, look at the model, write the journal's first entry."""
        if ratio_to not in get_args(RatioTo):
            raise ConfigurationError(f"ratio_to is {ratio_to!r}; allowed: reference, old")
        if dims is not None and (not isinstance(dims, int) or dims < 1):
            raise ConfigurationError(f"dims is {dims!r}; it must be a whole number above 0")
        self.book = _with_policy(rules if isinstance(rules, Rulebook) else load(rules), policy)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.controls: Controls = NoControls() if controls is None else controls
        earlier = _earlier(self.run_dir, resume=resume)
        vault = Vault(self.run_dir / "checkpoints") if self.run_dir else None
        self._actuator: Actuator = Actuation(self.controls, vault, lambda: self._findings.state_dict())
        restorable = vault is not None and self.controls.restorable
        self._set_up(ratio_to, dims, {name: k.base() for name, k in self.controls.knobs.items()}, restorable=restorable)
        self._listeners = list(listeners)
        self._journal = journal.Journal(self.run_dir)
        if earlier is not None and vault is not None:
            self._take_over(earlier, vault)
        self._begin()
        if earlier is not None:
            self._go_on()

    def _set_up(self, ratio_to: RatioTo, dims: int | None, bases: Mapping[str, float], *, restorable: bool) -> None:
        policy = self.book.policy
        self._intake = Intake(ratio_to, dims)
        self._findings = Findings(self.book)
        self._diagnosis = Diagnosis(self.book)
        self._ledger = Ledger(policy.probation, policy.keep)
        self._planner = Planner(self.book, bases, restorable=restorable)
        self.restorable = restorable
        self._bases = dict(bases)
        self._ticks = 0
        self._level = "ok"
        self._checks: list[Check] = []
        self._said_checks: set[str] = set()
        self._blind: tuple[Blind, ...] = ()
        self.resumed_from: int | None = None

    # ── the one method that a loop calls ──────────────────────────────────────────────────────────────────────
    def observe(self, step: int, metrics: Mapping[str, Any]) -> Verdict:
        """Look at one training step, act on it, and return the verdict.

        Args:
            step: the step's number; may start anywhere and should rise. After a rollback it may start again
                from `rolled_back_to` + 1, or simply go on.
            metrics: canonical names to floats, ints, numpy scalars or 0-d tensors of any device.

        Returns:
            The verdict. Never raises: an error inside the watchdog is logged and returned as a notice.
        """
        try:
            seen, notices = self._intake.read(step, metrics)
            seen.values.update(self._actuator.read())
            verdict = self._decide(seen, notices)
        except Exception as error:
            _log.exception("the watchdog failed inside observe; the run goes on")
            number = step if isinstance(step, int) else -1
            text = f"the watchdog failed on this step and did nothing: {type(error).__name__}: {error}"
            return Verdict(number, "notice", halt=bool(self._planner.halted), notices=(text,))
        for listener in self._listeners:
            try:
                listener(seen, verdict)
            except Exception:
                _log.exception("a listener failed and is dropped; the run goes on")
                self._listeners.remove(listener)
        return verdict

    def _decide(self, seen: Step, notices: list[str]) -> Verdict:
        number, values = seen
        scheduled = self.book.policy.check_every and self._ticks % self.book.policy.check_every == 0
        if scheduled:
            values.update(self._actuator.measure())
        self._ticks += 1
        self._journal.append({"kind": "step", "step": number, "values": values}, flush=False)
        findings = self._findings.detect(seen)
        level = findings[0].severity if findings else "ok"
        if scheduled or (level == "critical" and self._level != "critical"):
            notices += self._inspect(number)
        outcomes = self._read_back(number) if self._planner.doses else []
        loud = RANK[level] >= RANK["warning"]
        incidents: tuple[Incident, ...] = ()
        record: dict[str, Any] = {}
        if loud or self._diagnosis.open:
            opened, closed = self._diagnosis.diagnose(findings, values, self._checks, number)
            incidents = tuple(self._diagnosis.open.values())
            record = {"opened": opened, "closed": closed}
        proven, gone = self._ledger.tick(healthy=not loud)
        orders, effects = self._planner.plan(findings, values, self._ledger)
        if orders or effects or proven or gone or level != self._level or any(record.values()):
            record |= {"orders": orders, "effects": effects, "proven": proven, "gone": gone}
            self._journal.append({"kind": "decision", "step": number, "level": level, **record})
        self._actuator.settle_checkpoints(proven, gone)
        if orders:
            outcomes += self._carry_out(orders, seen, findings)
        self._level = level
        if self._ticks == 1 or self._ticks % _BLIND_EVERY == 0:
            self._note_blind(number)
        if notices:
            self._note(number, notices)
        shown = "notice" if notices and level == "ok" else level
        back = next((int(o.after) for o in outcomes if o.action == "rollback" and o.ok and o.after is not None), None)
        return Verdict(
            number, shown, incidents, tuple(outcomes), bool(self._planner.halted), back, findings, tuple(notices)
        )

    def _carry_out(self, orders: Sequence[Order], seen: Step, findings: Sequence[Finding]) -> list[Outcome]:
        """Execute, learn from the outcomes, and execute what follows from them."""
        done: list[Outcome] = []
        while orders:
            outcomes = self._actuator.execute(orders, seen.number)
            for outcome in outcomes:
                self._journal.append({"kind": "outcome", **outcome.as_json()})
                _log.log(logging.WARNING if outcome.ok and outcome.action != "checkpoint_now" else logging.INFO
                         if outcome.ok else logging.ERROR, "%s", briefing.sentence(outcome))  # fmt: skip
                self._remember(outcome)
            done += outcomes
            orders = self._planner.settle(orders, outcomes, findings, seen.values)
        self._journal.append({"kind": "state", "state": self.state_dict()})
        return done

    def _remember(self, outcome: Outcome) -> None:
        """Bring the watchdog's own state in line with what was done to the trainer's."""
        if outcome.action == "checkpoint_now" and outcome.ok:
            self._ledger.add(outcome.detail, outcome.step, self._findings.state_dict())
        elif outcome.action == "rollback" and outcome.ok and outcome.after is not None:
            target = next(c for c in self._ledger.entries if c.id == outcome.detail)
            newer = [c.id for c in self._ledger.entries if c.id > target.id and not c.proven]
            self._ledger.drop(newer)
            self._actuator.settle_checkpoints([], newer)
            if target.memory:
                self._findings.load_state_dict(target.memory)
            self._intake.rewind(int(outcome.after))

    def _read_back(self, number: int) -> list[Outcome]:
        outcomes = self._actuator.check({name: dose.rule for name, dose in self._planner.doses.items()}, number)
        for outcome in outcomes:
            self._journal.append({"kind": "held", **outcome.as_json()})
        return outcomes

    def _inspect(self, number: int | None) -> list[str]:
        self._checks = self._actuator.inspect()
        if self._checks:
            self._journal.append({"kind": "check", "step": number, "checks": self._checks})
        failed = [f"model check {c.name}: {c.detail}" for c in self._checks if c.passed is False]
        fresh = [text for text in failed if text not in self._said_checks]
        self._said_checks.update(fresh)
        return fresh

    def _note(self, number: int | None, notices: Sequence[str]) -> None:
        for text in notices:
            self._journal.append({"kind": "notice", "step": number, "text": text})
            _log.warning("%s", text)

    def _note_blind(self, number: int | None) -> None:
        blind = self._findings.blind()
        if blind != self._blind:
            self._blind = blind
            self._journal.append({"kind": "blind", "step": number, "rules": blind})

    # ── what a user may ask for ───────────────────────────────────────────────────────────────────────────────
    def checkpoint(self, step: int) -> Outcome:
        """Take a checkpoint now. It is a candidate until enough healthy observations have followed.

        Returns:
            The outcome; `ok` is False with the reason in `detail` where none was taken.
        """
        order = Order("checkpoint_now", None, "call", "asked for by the loop")
        self._journal.append({"kind": "call", "step": step, "call": "checkpoint"})
        outcome = self._actuator.execute([order], step)[0]
        self._journal.append({"kind": "outcome", **outcome.as_json()})
        self._remember(outcome)
        self._planner.settle([order], [outcome], (), {})
        return outcome

    def blind(self) -> tuple[Blind, ...]:
        """Return the rules that cannot see, what they miss, and why."""
        return self._findings.blind()

    @property
    def halted(self) -> str:
        """Return why the run was halted, or "" while it was not."""
        return self._planner.halted

    def close(self) -> None:
        """Write what is still to be written. Observing afterwards is allowed and leaves no trace on disk."""
        self._note_blind(None)
        self._journal.append({"kind": "state", "state": self.state_dict()})
        self._journal.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that it remembers, as JSON-able values."""
        return {
            "findings": self._findings.state_dict(), "diagnosis": self._diagnosis.state_dict(),
            "ledger": self._ledger.state_dict(), "planner": self._planner.state_dict(),
            "intake": self._intake.state_dict(), "ticks": self._ticks, "level": self._level,
            "checks": [list(c) for c in self._checks], "said_checks": sorted(self._said_checks),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._findings.load_state_dict(state["findings"])
        self._diagnosis.load_state_dict(state["diagnosis"])
        self._ledger.load_state_dict(state["ledger"])
        self._planner.load_state_dict(state["planner"])
        self._intake.load_state_dict(state["intake"])
        self._ticks, self._level = state["ticks"], state["level"]
        self._checks = [Check(*c) for c in state["checks"]]
        self._said_checks = set(state["said_checks"])

    @classmethod
    def from_journal(cls, start: Mapping[str, Any], actuator: Actuator, sink: journal.Journal) -> Self:
        """Return the watchdog as it was at a journal's start entry, on an actuator that plays the rest back."""
        dog = cls.__new__(cls)
        dog.book, dog.run_dir, dog.controls = from_json(start["rulebook"]), None, NoControls()
        dog._actuator, dog._journal, dog._listeners = actuator, sink, []
        dog._set_up(start["ratio_to"], start["dims"], start["bases"], restorable=start["restorable"])
        dog.load_state_dict(journal.decoded(start["state"]))
        return dog

    # ── the beginning ─────────────────────────────────────────────────────────────────────────────────────────
    def _begin(self) -> None:
        self.briefing = briefing.at_attach(
            self.book, self._bases, self.controls.knobs, restorable=self.restorable, dims=self._intake.dims
        )
        self._journal.append({
            "kind": "start", "schema": journal.SCHEMA, "time": time.time(), "ratio_to": self._intake.ratio_to, "dims": self._intake.dims,
            "bases": self._bases, "restorable": self.restorable, "state": self.state_dict(),
            "briefing": self.briefing, "digest": self.book.digest, "rulebook": self.book.model_dump(
                mode="json", by_alias=True, exclude={"rules": {"__all__": {"examples"}}}),
        })  # fmt: skip
        for line in self.briefing:
            _log.info("%s", line)
        self._note(None, self._inspect(None))

    def _take_over(self, state: Mapping[str, Any], vault: Vault) -> None:
        """Take an earlier session's memory: its doses stay due, its budget starts afresh, it is not halted."""
        self._planner.load_state_dict({**state["planner"], "halted": "", "rollbacks": [], "healthy": 0})
        self._ledger.entries = vault.proven()
        for checkpoint in reversed(self._ledger.entries):
            self.resumed_from = checkpoint.step
            self._findings.load_state_dict(checkpoint.memory)
            break

    def _go_on(self) -> None:
        """Restore the newest proven checkpoint and put the doses back in force on top."""
        step = 0 if self.resumed_from is None else self.resumed_from
        newest = tuple(c.id for c in self._ledger.choices())
        orders = [Order("rollback", None, "resume", "the run was resumed", checkpoints=newest)] if newest else []
        for outcome in self._actuator.execute([*orders, *self._planner.resume_orders()], step):
            self._journal.append({"kind": "resumed", **outcome.as_json()})
            if outcome.action == "rollback" and not outcome.ok:
                raise ConfigurationError(f"the run cannot be resumed: {outcome.detail}")


def _with_policy(book: Rulebook, policy: Mapping[str, Any]) -> Rulebook:
    unknown = [name for name in policy if name not in Policy.model_fields]
    if unknown:
        raise ConfigurationError(f"no option is called {unknown[0]!r}; allowed: {', '.join(Policy.model_fields)}")
    try:
        merged = Policy.model_validate({**book.policy.model_dump(), **policy})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}, not {f['input']!r}" for f in error.errors()]
        raise ConfigurationError("; ".join(faults)) from error
    return book.model_copy(update={"policy": merged})


def _earlier(run_dir: Path | None, *, resume: bool) -> Mapping[str, Any] | None:
    """Return the last state of an earlier session in this folder, where it is wanted."""
    exists = run_dir is not None and (run_dir / journal.FILE).exists()
    if resume and not exists:
        raise ConfigurationError(f"resume=True, but {run_dir} holds no run; leave resume out to begin one")
    if not exists or run_dir is None:
        return None
    if not resume:
        raise ConfigurationError(
            f"{run_dir} already holds a run: pass resume=True to go on from its newest proven checkpoint "
            "with its doses in force, or choose another run_dir"
        )
    state: Mapping[str, Any] = {}
    for entry in journal.read(run_dir):
        if entry["kind"] in ("start", "state"):
            state = entry["state"]
    return journal.decoded(state)


assert tuple(RANK) == SEVERITIES
