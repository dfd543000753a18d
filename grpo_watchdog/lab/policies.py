"""The watchdog under test, and what it is held against: each of them acts on a live training, or on purpose does not.

The baselines that see use the findings of the guarded rulebook and differ in what follows; `random` acts blindly at
about the rate of a guarded run; `oracle` knows the fault, and is what nobody who must find it out can beat.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpo_watchdog as gw
from grpo_watchdog import rulebook
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.lab.faults import Fault
from grpo_watchdog.lab.training import GrpoTraining

LOUD = frozenset({"warning", "critical"})
RANDOM_PER_RUN = 2.0  # interventions of `random` in a run, on average: about those of a guarded faulty run
_CHECKPOINT_EVERY = 10  # [steps]: a run here has 200 of them
_OFTEN: Mapping[str, Any] = {"checkpoint_every": _CHECKPOINT_EVERY, "probation": 10}
_BARE: Mapping[str, Any] = {**_OFTEN, "veto": None, "shadow": ["pause"]}  # one action and no other
_DICE = "mean_reward"  # the one metric that the rulebook of `random` sees; what it is fed is a die, not a reward
_FACES: tuple[dict[str, float | bool], ...] = (
    {"rollback": True},
    {"lower_learning_rate": 0.1},
    {"raise_kl_coef": 5.0},
    {"shrink_clip": 0.5},
)  # what `random` chooses from; the numbers are factors on what the run started with


class Scene(NamedTuple):
    """What a policy is attached to.

    Attributes:
        training: the live training.
        folder: where its journal and checkpoints go.
        fault: what will befall it, or None; only the oracle may look.
        onset: the step at which that begins.
        seed: for policies that throw dice.
    """

    training: GrpoTraining
    folder: Path
    fault: Fault | None
    onset: int
    seed: str


class Guard(Protocol):
    """A policy at work on one run.

    Attributes:
        cured: whether it has ended the fault itself; the benchmark then injects no more of it.
    """

    cured: bool

    def before(self, step: int) -> None:
        """Called before a step, before anything befalls the training."""
        ...

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:
        """Called after a step with its metrics; acts, and says what was seen and done."""
        ...

    def close(self) -> None:
        """Called when the run is over."""
        ...


class Unwatched:
    """Nobody looks and nobody acts."""

    cured = False

    def before(self, step: int) -> None:
        """Do nothing."""

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:  # noqa: ARG002 - nobody looks
        """Return that nothing was seen."""
        return gw.Verdict(step, "ok")

    def close(self) -> None:
        """Do nothing."""


class Watched(Unwatched):
    """A watchdog, attached."""

    def __init__(self, scene: Scene, **options: Any) -> None:
        """Attach it as a user would."""
        self._dog = scene.training.attach(scene.folder, **options)

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:
        """Let it look and act."""
        return self._dog.observe(step, metrics)

    def close(self) -> None:
        """Close its journal."""
        self._dog.close()


class HaltAtAlarm(Watched):
    """The same findings, nothing turned; the run stops at the first alarm, in the state that it is in."""

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:
        """Stop at the first warning."""
        verdict = super().after(step, metrics)
        if verdict.level not in LOUD:
            return verdict._replace(halt=False)
        rule = verdict.findings[0].rule if verdict.findings else ""
        halt = gw.Outcome(step, "halt", None, None, rule, f"the first {verdict.level}")
        return verdict._replace(actions=(halt,), halt=True)


class Dice(Watched):
    """Acts on steps that a die chooses, with the hands of a real watchdog."""

    def __init__(self, scene: Scene) -> None:
        """Attach a watchdog that sees nothing but the die."""
        super().__init__(scene, rules=_dice_rules())
        self._random = random.Random(scene.seed)
        self._chance = RANDOM_PER_RUN / (scene.training.steps - _CHECKPOINT_EVERY)

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:  # noqa: ARG002 - it is blind
        """Throw the die, and show it to the watchdog."""
        # Before that there may be nothing to go back to, and a rollback that cannot be done halts the run.
        thrown = self._random.random() < self._chance and step >= _CHECKPOINT_EVERY
        face = 1 + self._random.randrange(len(_FACES)) if thrown else 0
        return super().after(step, {_DICE: float(face)})


class Oracle(Unwatched):
    """Knows the fault: undoes it after its first step, or stops the run before it where it cannot be reached."""

    def __init__(self, scene: Scene) -> None:
        """Keep the scene; the snapshot is taken at the onset."""
        self._training, self._fault, self._onset = scene.training, scene.fault, scene.onset
        self._snapshot: Snapshot | None = None

    def before(self, step: int) -> None:
        """Take a snapshot just before the fault."""
        if self._fault is not None and step == self._onset:
            self._snapshot = Snapshot(self._training)

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:  # noqa: ARG002 - it knows
        """Undo the fault right after its first step."""
        if self._fault is None or self._snapshot is None or self.cured:
            return gw.Verdict(step, "ok")
        self.cured = True
        self._fault.end(self._training)
        self._snapshot.restore()
        back, outside = self._onset - 1, self._fault.lives_in == "outside"
        done = [gw.Outcome(step, "rollback", float(step), float(back), "oracle", self._fault.name)]
        if outside:
            done.append(gw.Outcome(step, "halt", None, None, "oracle", self._fault.name))
        return gw.Verdict(step, "critical", actions=tuple(done), halt=outside, rolled_back_to=back)


class Snapshot:
    """Everything of a training that a fault can touch, in memory, the settings included."""

    def __init__(self, training: GrpoTraining) -> None:
        """Copy it."""
        self._training = training
        self._settings, self._state = copy.deepcopy(vars(training.config)), training.state_dict()

    def restore(self) -> None:
        """Put it back."""
        vars(self._training.config).update(self._settings)
        self._training.load_state_dict(self._state)


def _dice_rules() -> gw.Rulebook:
    rules = {
        f"face{face}": {
            "kind": "near", "metric": _DICE, "value": face, "within": 0.25, "severity": "critical", "do": do,
            "keep_firing_for": 1, "title": {"en": "The die", "zh": "骰子"}, "source": "the benchmark",
        }
        for face, do in enumerate(_FACES, start=1)
    }  # fmt: skip
    policy = {
        "targets": "scaled", "checkpoint_every": _CHECKPOINT_EVERY, "probation": 1, "rollback_budget": 1000,
        "recur_within": 0, "recover_after": 1_000_000,
    }  # fmt: skip
    return rulebook.from_json({
        "schema": 1, "name": "dice", "title": {"en": "Dice", "zh": "骰子"}, "source": "the benchmark",
        "base": {"learning_rate": 1.0, "kl_coef": 1.0, "clip_epsilon": 1.0}, "policy": policy, "rules": rules,
    })  # fmt: skip


POLICIES: dict[str, Callable[[Scene], Guard]] = {
    "none": lambda scene: Unwatched(),  # noqa: ARG005 - nobody looks
    "guarded": lambda scene: Watched(scene, rules="guarded", **_OFTEN),
    "documented": lambda scene: Watched(scene, rules="documented", **_OFTEN),
    "halt_at_alarm": lambda scene: HaltAtAlarm(scene, rules="guarded", **_OFTEN, mode="shadow"),
    "random": Dice,
    "lr_only": lambda scene: Watched(scene, rules="guarded", **_BARE, ladder=[{"lower_learning_rate": 0.1}]),
    "rollback_only": lambda scene: Watched(scene, rules="guarded", **_BARE, ladder=[{"rollback": True}]),
    "oracle": Oracle,
}
"""Every policy by its name, from the scene that it is attached to."""


def policy_named(name: str) -> Callable[[Scene], Guard]:
    """Return a policy.

    Raises:
        ConfigurationError: there is none of that name; says which there are.
    """
    if name not in POLICIES:
        raise ConfigurationError(f"policy is {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]
