"""Replay: decide a recorded run again, and compare every decision byte for byte.

The judge is the same as live; what the trainer did (outcomes, checks) is played back from the journal.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_watchdog import journal
from grpo_watchdog.actions import Order, Outcome
from grpo_watchdog.approval import ANSWERED, DECLINED
from grpo_watchdog.controls import Check
from grpo_watchdog.metrics import Intake, Step
from grpo_watchdog.rulebook import from_json
from grpo_watchdog.verdict import Judge

_COMPARED = ("decision", "blind")


class Difference(NamedTuple):
    """One decision that came out otherwise; "" where there was none on that side."""

    step: int | None
    recorded: str
    replayed: str


class Replay(NamedTuple):
    """What a replay found.

    Attributes:
        steps: observations decided again.
        decisions: decisions compared.
        differences: those that differ, in order.
        torn: whether the journal's last line was torn.
    """

    steps: int
    decisions: int
    differences: tuple[Difference, ...]
    torn: bool


class Recording:
    """Plays a trainer's side back: the same outcomes and checks, in the same order."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self.outcomes: deque[Outcome] = deque()
        self.held: deque[Outcome] = deque()
        self.checks: deque[list[Check]] = deque()
        self.answers: deque[bool] = deque()

    def take(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of the journal: what it tells of the trainer's side is played back."""
        match entry["kind"]:
            case "outcome" if entry["held_back"] != DECLINED:  # that never came from the trainer's side
                self.outcomes.append(_outcome(entry))
            case "held":
                self.held.append(_outcome(entry))
            case "answer" if entry["how"] == ANSWERED:
                self.answers.append(entry["yes"])
            case "check":
                self.checks.append([Check(*check) for check in entry["checks"]])

    def read(self) -> dict[str, float]:
        """Return nothing: the knobs stand in the recorded step."""
        return {}

    def measure(self) -> dict[str, float]:
        """Return nothing: what was measured stands in the recorded step."""
        return {}

    def check(self, doses: Mapping[str, str], step: int) -> list[Outcome]:  # noqa: ARG002
        """Return what was read back then."""
        held = list(self.held)
        self.held.clear()
        return held

    def ask(self, question: Mapping[str, Any]) -> None:
        """Ask nobody."""

    def answer(self, question: Mapping[str, Any]) -> bool | None:  # noqa: ARG002
        """Return the answer that was given then, on the step on which it was."""
        return self.answers.popleft() if self.answers else None

    def settled(self, number: int) -> None:
        """Touch nothing."""

    def expect(self, metrics: Sequence[str]) -> None:
        """Touch nothing."""

    def execute(self, order: Order, step: int) -> Outcome:
        """Return what became of the order then; one that was never carried out then failed."""
        if self.outcomes:
            return self.outcomes.popleft()
        lost = "not in the journal: the process ended before it was done, or the decision differs"
        return Outcome(step, order.action, None, None, order.rule, order.reason, ok=False, detail=lost)

    def inspect(self) -> list[Check]:
        """Return what the look at the model found then."""
        return self.checks.popleft() if self.checks else []

    def settle_checkpoints(self, proven: Sequence[str], gone: Sequence[str]) -> None:
        """Touch nothing."""


class _Sink(journal.Journal):
    """Collects the decisions that are compared."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[tuple[int | None, str]] = []

    def append(self, entry: Mapping[str, Any], *, flush: bool = True) -> None:  # noqa: ARG002
        if entry["kind"] in _COMPARED:
            self.lines.append((entry["step"], journal.encode(entry).decode()))


def replay(run_dir: str | Path) -> Replay:
    """Decide every session of a run again.

    Args:
        run_dir: the run's folder, or its journal.

    Raises:
        JournalError: the journal cannot be read.
    """
    with journal.guarded(Path(run_dir)):
        return _replay(list(journal.read(Path(run_dir))))


def _replay(entries: list[dict[str, Any]]) -> Replay:
    torn = entries[-1]["kind"] == "notice" and entries[-1]["step"] is None and "torn" in entries[-1]["text"]
    steps, decisions, differences = 0, 0, list[Difference]()
    for session in _sessions(entries):
        recorded = [(e["step"], journal.encode(e).decode()) for e in session if e["kind"] in _COMPARED]
        replayed = _decide(session)
        if not _ended(session):  # a killed process may have decided what it had no time to write
            replayed = replayed[: len(recorded)]
        steps += sum(e["kind"] == "step" for e in session)
        decisions += len(recorded)
        differences += _compare(recorded, replayed)
    return Replay(steps, decisions, tuple(differences), torn)


def _sessions(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    session: list[dict[str, Any]] = []
    for entry in entries:
        if entry["kind"] == "start" and session:
            yield session
            session = []
        session.append(entry)
    if session:
        yield session


def _ended(session: Sequence[Mapping[str, Any]]) -> bool:
    return bool(session[-1]["kind"] == "end")


def _decide(session: Sequence[Mapping[str, Any]]) -> list[tuple[int | None, str]]:
    start, *rest = session
    recording, sink = Recording(), _Sink()
    judge = Judge(
        from_json(start["rulebook"]),
        recording,
        sink,
        intake=Intake(start["ratio_to"], start["dims"]),
        bases=start["bases"],
        restorable=start["restorable"],
        log=logging.Logger("replay", logging.CRITICAL + 1),  # noqa: LOG001 - silent: it was all said live
    )
    judge.load_state_dict(journal.decoded(start["state"]))
    pending: Mapping[str, Any] | None = None

    def decide() -> None:
        if pending is None:
            judge.inspect(None)
        elif pending["kind"] == "call" and pending["call"] == "expect":
            judge.expect(pending["metrics"])
        elif pending["kind"] == "call":
            judge.checkpoint(pending["step"])
        else:
            seen = Step(pending["step"], journal.decoded(pending["values"]))
            _, notices = judge.intake.read(seen.number, seen.values)
            judge.judge(seen, notices)

    for entry in rest:  # what followed a step belongs to it, so a step is decided when the next begins
        if entry["kind"] in ("step", "call"):
            decide()
            pending = entry
        else:
            recording.take(entry)
    decide()
    if _ended(session) or any(e["kind"] == "blind" and e["step"] is None for e in rest):  # killed while it closed
        judge.note_blind(None)
    return sink.lines


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    return Outcome(**{name: journal.decoded(entry[name]) if name in ("before", "after") else entry[name]
                      for name in Outcome._fields})  # fmt: skip


def _compare(
    recorded: Sequence[tuple[int | None, str]], replayed: Sequence[tuple[int | None, str]]
) -> list[Difference]:
    differences = []
    for index in range(max(len(recorded), len(replayed))):
        step, then = recorded[index] if index < len(recorded) else (None, "")
        again, now = replayed[index] if index < len(replayed) else (None, "")
        if then != now:
            differences.append(Difference(again if step is None else step, then, now))
    return differences
