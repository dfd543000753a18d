"""A trainer that is only numbers: real knobs over a dict, a state that is one number, faults on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_watchdog.controls import Check, DialKnob, Knob, Veto, item
from grpo_watchdog.errors import CheckpointError

HEALTHY = {"log_ratio": 0.1, "mean_ratio": 1.2, "loss": 0.1, "std_reward": 0.2, "mean_reward": 0.5}


class FakeControls:
    """Offers what a trainer offers.

    Attributes:
        settings: what the trainer reads; the knobs turn it.
        weights: the whole training state.
        fail: names of methods that raise.
        checks: what the look at the model finds.
        taken: what `signals` returns.
        armed: the vetoes last asked for.
        sentences: what `vetoed` tells next.
        replayed: for each restore, whether the data was to come again.
        paused: whether the optimizer's steps are skipped.
    """

    def __init__(self, *, restorable: bool = True, without: tuple[str, ...] = (), learning_rate: float = 1e-5) -> None:
        self.settings: dict[str, Any] = {"learning_rate": learning_rate, "kl_coef": 0.1, "clip_epsilon": 0.2}
        self.weights = 0.0
        self.fail: set[str] = set()
        self.checks: list[Check] = []
        self.taken: dict[str, float] = {}
        self.armed: Veto | None = None
        self.sentences: list[str] = []
        self.replayed: list[bool] = []
        self.paused = False
        self.restorable = restorable
        self.knobs: dict[str, Knob] = {
            name: DialKnob(item(self.settings, name), "max" if name == "kl_coef" else "min")
            for name in self.settings
            if name not in without
        }

    def save(self, folder: Path) -> None:
        if "save" in self.fail:
            raise CheckpointError("the fake cannot save")
        (folder / "weights.json").write_text(json.dumps(self.weights))

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        if "restore" in self.fail:
            raise CheckpointError("the fake cannot restore")
        self.replayed.append(replay_data)
        self.weights = json.loads((folder / "weights.json").read_text())

    def inspect(self) -> list[Check]:
        if "inspect" in self.fail:
            raise RuntimeError("the fake cannot be looked at")
        return list(self.checks)

    def measure(self) -> dict[str, float]:
        return {}

    def signals(self) -> dict[str, float]:
        if "signals" in self.fail:
            raise RuntimeError("the fake has no signals")
        return dict(self.taken)

    def arm(self, veto: Veto | None) -> None:
        if "arm" in self.fail:
            raise RuntimeError("the fake cannot be armed")
        self.armed = veto

    def vetoed(self) -> list[str]:
        if "vetoed" in self.fail:
            raise RuntimeError("the fake cannot tell")
        told, self.sentences = self.sentences, []
        return told

    def pause(self, *, on: bool) -> None:
        self.paused = on

    def rebase(self) -> None:
        pass
