"""Recorded: one run from its log, decided row by row by the same judge as live, with nothing to touch.

Every decision is taken from the rows up to that row only. What would have been done is what the plan orders in shadow:
the log goes on as it was recorded, so what follows the first order is the run that nobody helped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from grpo_watchdog import journal
from grpo_watchdog.actions import Outcome
from grpo_watchdog.actuation import Actuation
from grpo_watchdog.controls import Dial, DialKnob, Knob, NoControls
from grpo_watchdog.diagnosis import Diagnosis
from grpo_watchdog.errors import LogError
from grpo_watchdog.logs import Log, Row, opened
from grpo_watchdog.metrics import Intake
from grpo_watchdog.names import FAMILIES, Family, recognise
from grpo_watchdog.reports.run import Run, Teller
from grpo_watchdog.rule import RANK, no_such
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.verdict import Judge

_PEEK = 64  # rows whose keys tell the trainer
_MOST_RUNS = 1000  # in one file
_MOST_ACTS = 1000  # kept of one run
_UNKNOWN_RATE = 1.0  # stands for a learning rate that the log does not have: what is ordered is a part of it
_SETTINGS = {"learning_rate": "min", "kl_coef": "max", "clip_epsilon": "min"}
_QUIET = logging.Logger("recorded", logging.CRITICAL + 1)  # noqa: LOG001 - the report says it all


class Act(NamedTuple):
    """One thing that would have been done."""

    step: int
    action: str
    reason: str


@dataclass
class Recorded:
    """What a recorded run comes to.

    Attributes:
        path: the log; with `#name` where it holds several runs.
        trainer: the family whose names it was read with.
        formats: the formats of its files.
        story: the run as a report tells it.
        alarm_step: the first step at a warning or above, or None.
        critical_step: the first step at critical, or None.
        would_act: what would have been done, in order.
        unknown: keys of which no table knows what they mean; none of them is looked at.
        notices: what could not be read, and how the rest was.
    """

    path: str
    trainer: str
    formats: list[str]
    story: Run
    alarm_step: int | None = None
    critical_step: int | None = None
    would_act: list[Act] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Return the worst level: ok, notice, warning or critical."""
        if self.critical_step is not None:
            return "critical"
        return self.story.verdict if self.alarm_step is None else "warning"


def recorded(
    files: tuple[str, ...],
    book: Rulebook,
    *,
    trainer: str | None = None,
    steps_per_row: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Recorded]:
    """Return every run in the files of one log, decided.

    Args:
        files: in the order of time, as `logs.logs_in` gives them.
        book: the rulebook.
        trainer: a family of names; None recognises it from the keys.
        steps_per_row: of a log that does not number its rows [steps].
        progress: called with the bytes read since the last call.

    Raises:
        LogError: nothing in it can be read, or no such trainer.
    """
    refuse_trainer(trainer)
    with opened(files, progress) as log:
        rows = _renumbered(log, steps_per_row)
        first = list(islice(rows, _PEEK))
        keys = dict.fromkeys(key for row in first for key in row.values)
        family = recognise(keys) if trainer is None else FAMILIES[trainer]
        runs: dict[str, _Reading] = {}
        for row in chain(first, rows):
            reading = runs.get(row.run)
            if reading is None:
                if len(runs) == _MOST_RUNS:
                    raise LogError(f"{log.path}: more than {_MOST_RUNS} runs in one file")
                reading = runs[row.run] = _Reading(book, family, family.canonical(row.values))
            reading.take(row)
        return [reading.done(log, name, alone=len(runs) == 1) for name, reading in runs.items()]


def refuse_trainer(trainer: str | None) -> None:
    """Raise a LogError where there is no such family of names."""
    if trainer is not None and trainer not in FAMILIES:
        raise LogError(no_such("trainer", trainer, FAMILIES))


def _renumbered(log: Log, steps_per_row: int) -> Iterator[Row]:
    """Number rows that have no step, and tell a run that begins anew from one that goes on from a checkpoint."""
    last: dict[str, tuple[int, int, str]] = {}  # by run: its first step, its last, what it is called now
    for row in log.rows:
        start, before, name = last.get(row.run, (0, 0, row.run))
        step = row.step
        if step is None:
            step = before + steps_per_row
        elif row.run in last and step < before:
            if step <= start:
                begun = 1 + sum(1 for other in last if other.startswith(f"{row.run}~"))
                log.notices.append(f"{row.place or f'step {step}'}: begins anew at step {step} after {before}: a run")
                last[f"{row.run}~{begun}"] = last[row.run]
                name, start = f"{row.run}#{begun + 1}".lstrip("#"), step
            else:
                log.notices.append(f"{row.place or f'step {step}'}: goes back from step {before} to {step}: resumed")
        if row.run not in last:
            start = step
        last[row.run] = (start, step, name)
        yield row._replace(step=step, run=name)


class _Sink(journal.Journal):
    """Tells a run from the entries, without keeping them."""

    def __init__(self, run: Run) -> None:
        super().__init__(None)
        self.run, self.teller = run, Teller(run)

    def append(self, entry: Mapping[str, Any], *, flush: bool = True) -> None:  # noqa: ARG002
        if entry["kind"] == "step":
            run = self.run
            run.rows += 1
            run.first_step = entry["step"] if run.first_step is None else run.first_step
            run.last_step = entry["step"]
        elif entry["kind"] != "state":
            self.teller.take(entry)


class _Paper(NoControls):
    """The settings of a recorded run, as far as it logged them; what is done to them is only thought."""

    restorable = True

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = dict(values)
        self.knobs: Mapping[str, Knob] = {name: self._knob(name) for name in values}

    def _knob(self, name: str) -> Knob:
        dial = Dial(lambda: self.values[name], lambda value: None, f"the log's {name}")  # noqa: ARG005
        return DialKnob(dial, "max" if _SETTINGS[name] == "max" else "min")


class _Reading:
    """One run, as it is read."""

    def __init__(self, book: Rulebook, family: Family, first: Mapping[str, float]) -> None:
        self._family, self._book = family, book.with_policy({"mode": "shadow"})
        settings = {name: first[name] for name in _SETTINGS if first.get(name, 0.0) > 0.0}
        settings.setdefault("learning_rate", _UNKNOWN_RATE)  # every trainer has one, logged or not
        self._paper, self._had = _Paper(settings), dict[str, float]()
        self._run = Run(Path(), self._book, [], {})
        self._sink = _Sink(self._run)
        actuation = Actuation(self._paper, None, dict, shadow_all=True)
        self._judge = Judge(self._book, actuation, self._sink, intake=Intake(family.ratio_to), bases=settings,
                            restorable=True, log=_QUIET)  # fmt: skip
        self._judge.diagnosis = Diagnosis(self._book, {})  # what is too high is said by the document, not by this run
        self._keys: dict[str, None] = {}
        self.alarm: int | None = None
        self.critical: int | None = None
        self.acts: list[Act] = []

    def take(self, row: Row) -> None:
        """Decide one row."""
        assert row.step is not None
        if not row.values.keys() <= self._keys.keys():
            self._keys.update(dict.fromkeys(row.values))
        values = self._family.canonical(row.values)
        for name in _SETTINGS:
            value = values.get(name)
            if value is None or value != value:  # noqa: PLR0124 - not-a-number is no setting
                continue
            if name in self._paper.values:
                self._paper.values[name] = values[f"{name}_set"] = value
            self._had[name] = max(value, self._had.get(name, 0.0))
        if self._judge.intake.last >= row.step:
            self._judge.intake.rewind(row.step - 1)
        seen, notices = self._judge.intake.read(row.step, values)
        verdict = self._judge.judge(seen, notices)
        if RANK[verdict.level] >= RANK["warning"] and self.alarm is None:
            self.alarm = row.step
        if verdict.level == "critical" and self.critical is None:
            self.critical = row.step
        self._imagine(verdict.actions)

    def _imagine(self, actions: tuple[Outcome, ...]) -> None:
        for outcome in actions:
            if outcome.held_back and len(self.acts) < _MOST_ACTS:
                self.acts.append(Act(outcome.step, outcome.action, outcome.reason))

    def done(self, log: Log, name: str, *, alone: bool) -> Recorded:
        """Return what it came to."""
        self._judge.note_blind(None)
        run = self._sink.teller.told()
        path = log.path if alone or not name else f"{log.path}#{name}"
        run.path, run.bases = Path(path), {name: value for name, value in self._had.items() if value > 0}
        unknown = self._family.unknown(self._keys)
        return Recorded(path, self._family.name, log.formats, run, self.alarm, self.critical, self.acts, unknown,
                        list(log.notices))  # fmt: skip
