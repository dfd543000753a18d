"""A run as its journal tells it: what every report is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_watchdog import journal
from grpo_watchdog.approval import told
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook, from_json

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class IncidentStory:
    """One incident from its opening to its end.

    Attributes:
        id: counts up over the run.
        rule: the root's rule, at last.
        rules: every rule that was its root.
        severity: the worst that it reached.
        since: the step at which the root began to hold.
        closed: the step at which it ended, or None while it is open.
        evidence: findings (as dicts) when it was at its worst, the root first.
        causes: ranked causes (cause, supported, contradicted).
        checks: what the look at the model found (name, passed, detail).
        actions: outcomes (as dicts) that its rules asked for.
        effects: whether the doses helped, as dicts.
        book: the rulebook of its session.
    """

    id: int
    rule: str
    rules: set[str]
    book: Rulebook
    severity: str
    since: int
    closed: int | None = None
    evidence: list[dict[str, Any]] = field(default_factory=list)
    causes: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    actions: list[dict[str, Any]] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """A whole run.

    Attributes:
        path: its folder.
        book: the rulebook that it was watched with; of the last session, as are briefing and bases.
        briefing: what was said at attach.
        bases: what each knob was set to at attach.
        rows: observations.
        first_step: the first step's number, or None.
        last_step: the last step's number, or None.
        verdict: the worst level.
        now: the level at the end.
        halted: why it was halted, or "".
        halted_at: the step at which it was, or None.
        incidents: in the order in which they opened.
        actions: every outcome, as dicts.
        notices: (step, text).
        blind: rules that could not see at the end, as dicts of rule, missing, reason.
        doses: limits in force at the end, by action.
        proven: step numbers of the proven checkpoints known at the end.
        sessions: how many times it was started.
    """

    path: Path
    book: Rulebook
    briefing: list[str]
    bases: dict[str, float]
    rows: int = 0
    first_step: int | None = None
    last_step: int | None = None
    verdict: str = "ok"
    now: str = "ok"
    halted: str = ""
    halted_at: int | None = None
    incidents: list[IncidentStory] = field(default_factory=list)
    actions: list[dict[str, Any]] = field(default_factory=list)
    notices: list[tuple[int | None, str]] = field(default_factory=list)
    blind: list[dict[str, Any]] = field(default_factory=list)
    doses: dict[str, float] = field(default_factory=dict)
    proven: list[int] = field(default_factory=list)
    sessions: int = 1

    def frame(self) -> pd.DataFrame:
        """Return every observation as a data frame: one row a step, one column a metric; absent is NaN."""
        import pandas as pd  # noqa: PLC0415 - only for those who want a frame

        rows = [
            {"step": entry["step"], **journal.decoded(entry["values"])}
            for entry in journal.read(self.path)
            if entry["kind"] == "step"
        ]
        return pd.DataFrame(rows)


def read_run(run_dir: str | Path) -> Run:
    """Return a run from its folder.

    Raises:
        JournalError: there is no journal there that can be read.
    """
    path = Path(run_dir)
    with journal.guarded(path):
        entries = journal.read(path)
        first = next(entries)
        teller = Teller(Run(path, from_json(first["rulebook"]), first["briefing"], first["bases"]))
        for entry in entries:
            teller.take(entry)
        return teller.told()


class Teller:
    """Makes a run out of a journal's entries, one by one.

    Args:
        run: with what was known when it began.
    """

    def __init__(self, run: Run) -> None:
        """Start with nothing told."""
        self._run = run
        self._stories: dict[int, IncidentStory] = {}
        self._steps: dict[str, int] = {}  # of the checkpoints that were taken
        self._offset = 0  # each session counts its incidents from 1; here they count on
        self._tellers: dict[str, Callable[[Run, Mapping[str, Any]], None]] = {
            "start": self._start,
            "step": self._step,
            "decision": self._decision,
            "outcome": self._outcome,
            "held": self._outcome,
            "resumed": self._resumed,
            "notice": self._notice,
            "question": self._question,
            "answer": self._answer,
            "blind": self._blind,
            "state": self._state,
        }

    def take(self, entry: Mapping[str, Any]) -> None:
        """Take one entry, as it stands in the journal."""
        teller = self._tellers.get(entry["kind"])
        if teller is not None:
            teller(self._run, entry)

    def told(self) -> Run:
        """Return the run as far as it was told."""
        self._run.incidents = list(self._stories.values())
        return self._run

    def _start(self, run: Run, entry: Mapping[str, Any]) -> None:
        """Begin a later session of the same run: what was open ended with the one before."""
        run.sessions += 1
        run.book, run.briefing, run.bases = from_json(entry["rulebook"]), entry["briefing"], entry["bases"]
        run.now = "ok"
        for story in self._stories.values():
            story.closed = run.last_step if story.closed is None else story.closed
        self._offset = max(self._stories, default=0)
        run.halted, run.halted_at = "", None

    def _step(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.rows += 1
        run.first_step = entry["step"] if run.first_step is None else run.first_step
        run.last_step = entry["step"]

    def _decision(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.now = entry["level"]
        if RANK[run.now] > RANK[run.verdict]:
            run.verdict = run.now
        for row in entry.get("opened", ()):
            self._open(run, row)
        for number, _, step, into in entry.get("closed", ()):
            self._close(number + self._offset, step, into)
        run.proven = sorted({*run.proven, *(self._steps[c] for c in entry["proven"] if c in self._steps)})
        run.proven = [s for s in run.proven if s not in {self._steps.get(c) for c in entry["gone"]}]
        for row in entry["effects"]:
            effect = dict(zip(("action", "rule", "metric", "before", "after", "helped"), row, strict=True))
            for story in self._by_rule(effect["rule"]):
                story.effects.append({"step": entry["step"], **effect})

    def _close(self, number: int, step: int, into: int | None) -> None:
        self._stories[number].closed = step
        if into is not None:
            part, whole = self._stories.pop(number), self._stories[into + self._offset]
            whole.rules |= part.rules
            whole.since = min(whole.since, part.since)
            whole.actions = sorted(part.actions + whole.actions, key=_by_step)
            whole.effects = sorted(part.effects + whole.effects, key=_by_step)

    def _open(self, run: Run, row: list[Any]) -> None:
        number, rule, severity, since, _, evidence, causes, checks, _ = row
        number += self._offset
        names = (
            "rule",
            "severity",
            "rank",
            "since",
            "step",
            "metric",
            "value",
            "worst",
            "limit",
            "note",
            "inhibited_by",
            "age",
            "alone",
        )
        story = self._stories.setdefault(number, IncidentStory(number, rule, set(), run.book, severity, since))
        story.rule, story.severity, story.since = rule, severity, min(since, story.since)
        story.rules.add(rule)
        story.evidence = [dict(zip(names, finding, strict=True)) for finding in evidence]
        story.causes = [dict(zip(("cause", "supported", "contradicted"), cause, strict=True)) for cause in causes]
        story.checks = [dict(zip(("name", "passed", "detail"), check, strict=True)) for check in checks]

    def _resumed(self, run: Run, entry: Mapping[str, Any]) -> None:
        name = "resume" if entry["action"] == "rollback" else entry["action"]
        self._outcome(run, {**entry, "action": name})

    def _outcome(self, run: Run, entry: Mapping[str, Any]) -> None:
        outcome = {key: value for key, value in entry.items() if key != "kind"}
        run.actions.append(outcome)
        if outcome["action"] == "checkpoint_now" and outcome["ok"]:
            self._steps[outcome["detail"]] = outcome["step"]
        for story in self._by_rule(outcome["rule"]):
            story.actions.append(outcome)
        if outcome["action"] == "halt" and not outcome.get("held_back"):
            run.halted, run.halted_at = outcome["reason"], outcome["step"]

    def _notice(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.notices.append((entry["step"], entry["text"]))

    def _question(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.notices.append((entry["step"], f"question {entry['number']}: {told(entry)}"))

    def _answer(self, run: Run, entry: Mapping[str, Any]) -> None:
        what = {True: "yes", False: "no", None: "withdrawn"}[entry["yes"]]
        run.notices.append((entry["step"], f"question {entry['number']}: {what} ({entry['how']})"))

    def _blind(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.blind = [{"rule": rule, "missing": missing, "reason": reason} for rule, missing, reason in entry["rules"]]

    def _state(self, run: Run, entry: Mapping[str, Any]) -> None:
        run.doses = {action: dose[0] for action, dose in journal.decoded(entry["planner"])["doses"].items()}
        run.proven = entry["proven"]

    def _by_rule(self, rule: str) -> list[IncidentStory]:
        """Return the newest incident of a rule, open or closed."""
        return [s for s in self._stories.values() if rule in s.rules][-1:]


def _by_step(entry: Mapping[str, Any]) -> int:
    return int(entry["step"])
