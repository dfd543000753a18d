"""What a fault or a look-alike is, and what drives one through a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_watchdog.lab.grpo import GrpoTraining

Begin = Callable[[GrpoTraining, float], None]
End = Callable[[GrpoTraining], None]
ALL_TASKS = frozenset({"reference", "chain", "tokens"})
OLD_RATIO = frozenset({"chain", "tokens"})


def nothing(_training: GrpoTraining) -> None:
    """End what is over already: the damage is done, and no setting holds it."""


@dataclass(frozen=True)
class Fault:
    """One way in which a run breaks.

    Attributes:
        name: the class of the fault.
        lives_in: what could cure it. "settings": a number that the trainer reads, which no checkpoint holds.
            "process": a state in memory, which a rollback brings back. "batch": one step's data. "outside": the reward
            service or the numeric mode, which nothing the watchdog can turn reaches.
        causes: ids of the causes that name it rightly.
        severities: how hard it strikes, the hardest last; what the number means is the fault's own.
        test_severities: others, for the published split.
        begin: makes it happen, given a severity; called before a step.
        end: takes it away, whether it began or not. What it has done to the weights stays.
        tasks: where it exists.
        lasts: steps after which it ends by itself; None: for good [steps].
    """

    name: str
    lives_in: Literal["settings", "process", "batch", "outside"]
    causes: frozenset[str]
    severities: tuple[float, ...]
    test_severities: tuple[float, ...]
    begin: Begin
    end: End = nothing
    tasks: frozenset[str] = ALL_TASKS
    lasts: int | None = None


@dataclass(frozen=True)
class Lookalike:
    """Something that looks like trouble and is none.

    Attributes:
        name: what it is called.
        begin: makes it happen; called before a step. Its number, there for likeness with a fault, means nothing.
        end: takes it away.
        tasks: where it exists.
        lasts: steps after which it ends by itself; None: for good [steps].
        at_start: whether it is a setting of the whole run, there from the first step on.
    """

    name: str
    begin: Begin
    end: End = nothing
    tasks: frozenset[str] = ALL_TASKS
    lasts: int | None = None
    at_start: bool = False


class Injection:
    """Drives one fault or look-alike: call `before_step` before each step of the run.

    It remembers nothing: the step decides. A rollback does not make it strike again, as long as the steps count on.

    Args:
        event: the fault or look-alike.
        severity: how hard it strikes.
        onset: the step before which it begins; 0 for one that is there from the start.
    """

    def __init__(self, event: Fault | Lookalike, severity: float = 1.0, onset: int = 0) -> None:
        self.event, self.severity = event, severity
        self.onset = 0 if isinstance(event, Lookalike) and event.at_start else onset

    def before_step(self, training: GrpoTraining, step: int) -> None:
        """Begin or end it, where this is the step for it."""
        if step == self.onset:
            self.event.begin(training, self.severity)
        if self.event.lasts is not None and step == self.onset + self.event.lasts:
            self.event.end(training)


def replace_setting(training: GrpoTraining, owner: Any, name: str, value: Any) -> None:  # noqa: ANN401
    """Replace an attribute, and set the value aside that it had before any fault."""
    training.set_aside.setdefault(name, getattr(owner, name))
    setattr(owner, name, value)


def put_back(training: GrpoTraining, owner: Any, name: str) -> None:  # noqa: ANN401
    """Put an attribute back as it was before `replace_setting`; do nothing where it was not called."""
    if name in training.set_aside:
        setattr(owner, name, training.set_aside.pop(name))
