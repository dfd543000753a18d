"""One run of the rescue benchmark: a live training, what befalls it, a policy on it, and what came of it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import grpo_watchdog as gw
from grpo_watchdog.actions import KNOB_ACTIONS, WATCHFUL
from grpo_watchdog.lab.cells import Cell, Job, Row
from grpo_watchdog.lab.faults import FAULTS, LOOKALIKES, Injection, Lookalike
from grpo_watchdog.lab.policies import LOUD, Guard, Scene, policy_named
from grpo_watchdog.lab.training import TASKS, GrpoTraining

Befall = Callable[[GrpoTraining, int], object]
"""What happens to a training before a step."""


def do(job: Job) -> list[Row]:
    """Run a job; the run that nobody watches comes first, since the others are held against it."""
    rows: list[Row] = []
    unwatched, healthy = job.unwatched, job.healthy
    if unwatched is None:
        rows.append(play(job.cell, "none"))
        unwatched = rows[0].reward
    healthy = unwatched if healthy is None else healthy
    rows += [play(job.cell, name) for name in job.policies if name != "none"]
    return [row._replace(healthy=healthy, unwatched=unwatched) for row in rows]


def play(cell: Cell, policy: str) -> Row:
    """Play one run to its end. Deterministic for a cell and a policy, `seconds` apart.

    `healthy` and `unwatched` of the row are its own reward: only who has played those runs can tell them.
    """
    attach = policy_named(policy)
    torch.set_num_threads(1)  # a step is small: two threads would only wait for each other
    began = time.perf_counter()
    training, befall = _set_up(cell)
    steps, onset = training.steps, cell.onset(training.steps)
    fault = FAULTS[cell.event] if cell.kind == "fault" else None
    notes, crashed = Notes(onset), ""
    with _quiet(), tempfile.TemporaryDirectory(prefix="grpo-watchdog-", dir=_memory_disk()) as folder:
        guard = attach(Scene(training, Path(folder) / "run", fault, onset, f"{cell.key}/dice"))
        try:
            for step in range(steps):
                notes.take(step, _step(training, guard, befall, step))
                if notes.halted:
                    break
        except Exception as error:  # noqa: BLE001 - a sick training may raise anything: its run ends there, and that is counted
            crashed = f"{type(error).__name__}: {error}".splitlines()[0]
        guard.close()
        reward = _reward(training)
    right = notes.cause in fault.causes if fault is not None and notes.cause else None
    return Row(
        *cell, policy, fault.lives_in if fault is not None else "", steps, onset, notes.ran, notes.lost,
        reward, reward, reward, tuple(notes.interventions), notes.alarm, notes.early_alarm, notes.cause, right,
        notes.halted, crashed, round(time.perf_counter() - began, 3),
    )  # fmt: skip


class Notes:
    """What is written down about a run, a verdict at a time.

    Args:
        onset: the step at which its fault begins.
    """

    def __init__(self, onset: int) -> None:
        """Start with nothing seen."""
        self._onset = onset
        self._learned: dict[int, int] = {}  # step -> steps of training that its state held: a rollback takes some away
        self._now = 0
        self._standing: set[tuple[str, int]] = (
            set()
        )  # what has been firing since before the onset: no sign of the fault
        self._acted_on = False  # whether the cause is that of the incident that something was done about
        self.ran = 0
        self.interventions: list[tuple[int, str, bool]] = []
        self.alarm: int | None = None
        self.early_alarm: int | None = None
        self.cause = ""
        self.halted = False

    @property
    def lost(self) -> int:
        """Return how many steps of training rollbacks took away."""
        return self.ran - self._now

    def take(self, step: int, verdict: gw.Verdict) -> None:
        """Write one verdict down."""
        self.ran += 1
        self._now += 1
        if verdict.rolled_back_to is not None:
            self._now = self._learned.get(verdict.rolled_back_to, 0)
        self._learned[step] = self._now
        self.halted = verdict.halt
        acts = [o for o in verdict.actions if o.action not in WATCHFUL and not o.held_back]
        firing = {finding.rule for finding in verdict.findings}
        self.interventions += [(o.step, _name(o, firing), o.ok) for o in acts]
        loud = {(f.rule, f.rank) for f in verdict.findings if f.severity in LOUD}
        if step < self._onset:
            self._standing = loud
            if verdict.level in LOUD and self.early_alarm is None:
                self.early_alarm = step
            return
        self._standing &= loud
        fresh = loud - self._standing or (verdict.level in LOUD and not loud)
        if fresh and self.alarm is None:
            self.alarm = step
        self._blame(verdict, [o.rule for o in acts])

    def _blame(self, verdict: gw.Verdict, rules: list[str]) -> None:
        """Keep the cause of the first incident, until something is done about one: then that one's."""
        if self._acted_on:
            return
        since = [i for i in verdict.incidents if i.opened >= self._onset and i.causes]
        led = [i for i in verdict.incidents if i.causes and {i.rule, *(f.rule for f in i.evidence)} & set(rules)]
        if led or (since and not self.cause):
            self.cause = (led or since)[0].causes[0].cause
            self._acted_on = bool(led)


def _name(outcome: gw.Outcome, firing: set[str]) -> str:
    """Return an action's name, or that of its release where a limit is only let up step by step in good health."""
    action = KNOB_ACTIONS.get(outcome.action)
    return outcome.action if action is None or outcome.rule in firing else action.release_name


def _set_up(cell: Cell) -> tuple[GrpoTraining, Befall]:
    """Return a cell's training, and what will befall it."""
    training = TASKS[cell.task](cell.seed)
    if cell.kind == "healthy":
        return training, lambda training, step: None  # noqa: ARG005
    event = FAULTS[cell.event] if cell.kind == "fault" else LOOKALIKES[cell.event]
    if isinstance(event, Lookalike) and event.at_start:  # a setting of the run: there before anybody is attached
        event.begin(training, 1.0)
        return training, lambda training, step: None  # noqa: ARG005
    return training, Injection(event, cell.severity, cell.onset(training.steps)).before_step


def _step(training: GrpoTraining, guard: Guard, befall: Befall, step: int) -> gw.Verdict:
    guard.before(step)
    if not guard.cured:
        befall(training, step)
    return guard.after(step, training.train_one_step())


def _reward(training: GrpoTraining) -> float:
    """Return the true reward of the state that a run ended in; 0 where that state cannot even be sampled from."""
    try:
        return float(training.true_reward())
    except Exception:  # noqa: BLE001 - a policy of NaN may raise where it is sampled from
        return 0.0


def _memory_disk() -> str | None:
    """Return a folder in memory, where there is one: a thousand runs of checkpoints would wear a disk out."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a fresh folder with a random name is made in it


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the watchdog's log off the screen."""
    log = logging.getLogger("grpo_watchdog")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
