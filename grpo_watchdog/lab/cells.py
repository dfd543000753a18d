"""What the rescue benchmark runs, and what comes of it: cells and rows, plain records."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["healthy", "lookalike", "fault"]
ONSET = (0.3, 0.6)  # the shares of a run between which the step is drawn at which its fault begins


class Cell(NamedTuple):
    """What happens to a training, whoever watches.

    Attributes:
        task: a name in TASKS.
        kind: whether a fault befalls it, something that only looks like one, or nothing.
        event: the name of the fault or look-alike; "" for nothing.
        severity: the fault's; 0 for others.
        seed: of everything.
    """

    task: str
    kind: Kind
    event: str
    severity: float
    seed: int

    @property
    def key(self) -> str:
        """Return a name that no other cell has."""
        return f"{self.task}/{self.kind}/{self.event}/{self.severity:g}/{self.seed}"

    def onset(self, steps: int) -> int:
        """Return the step at which it begins, the same for every policy and severity [steps]."""
        if self.kind == "healthy":
            return 0
        share = random.Random(f"onset/{self.task}/{self.event}/{self.seed}").uniform(*ONSET)
        return int(share * steps)


class Row(NamedTuple):
    """What came of one run; a line of runs.jsonl and of results.csv.

    Attributes:
        task: the cell's.
        kind: the cell's.
        event: the cell's.
        severity: the cell's.
        seed: the cell's.
        policy: who watched.
        lives_in: what can cure the fault; "" where there is none.
        steps: the budget [steps].
        onset: when it began; 0 in a healthy run [steps].
        ran: steps that were run, those that a rollback lost included [steps].
        lost: steps that rollbacks lost [steps].
        reward: the true reward at the end.
        healthy: that of the same training when nothing befalls it.
        unwatched: that of the same cell when nobody watches.
        interventions: (step, action, ok) of everything that was done; checkpoints are not among them.
        alarm: the first step at or after the onset with a warning or worse; one that stood since before is none.
        early_alarm: the first such step before the onset.
        cause: the likeliest cause of the incident that led to the first intervention, or else of the first incident
            opened at or after the onset; "" where there was none.
        right: whether that names the fault; None where there is no fault or no cause.
        halted: whether the run was stopped.
        crashed: the error that ended the run; "" where none did.
        seconds: of the run, the evaluation included.
    """

    task: str
    kind: Kind
    event: str
    severity: float
    seed: int
    policy: str
    lives_in: str
    steps: int
    onset: int
    ran: int
    lost: int
    reward: float
    healthy: float
    unwatched: float
    interventions: tuple[tuple[int, str, bool], ...]
    alarm: int | None
    early_alarm: int | None
    cause: str
    right: bool | None
    halted: bool
    crashed: str
    seconds: float

    @property
    def cell(self) -> Cell:
        """Return what happened to it."""
        return Cell(self.task, self.kind, self.event, self.severity, self.seed)

    @property
    def key(self) -> str:
        """Return a name that no other run has."""
        return f"{self.cell.key}/{self.policy}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Return the row that `_asdict` gave, after a way through JSON."""
        return cls(**{**data, "interventions": tuple((step, name, ok) for step, name, ok in data["interventions"])})


class Job(NamedTuple):
    """The runs of one cell.

    Attributes:
        cell: what happens.
        policies: who watches, each in a run of its own.
        healthy: the reward when nothing befalls the training; None where this very job finds it out.
        unwatched: the reward when nobody watches; None where this very job finds it out.
    """

    cell: Cell
    policies: tuple[str, ...]
    healthy: float | None = None
    unwatched: float | None = None
