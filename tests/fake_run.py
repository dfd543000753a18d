"""A training run made of three numbers: all that the watchdog may turn, save and restore."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpo_watchdog as gw
from grpo_watchdog.controls import DialKnob, Veto

KNOBS = ("learning_rate", "kl_coef", "clip_epsilon")


@dataclass
class Config:
    """What the trainer reads on every step; the document's base values."""

    learning_rate: float = 1e-5
    kl_coef: float = 0.1
    clip_epsilon: float = 0.2

    def now(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in KNOBS}


class FakeControls:
    """Turns a Config, and keeps one number as the state of the model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.knobs: Mapping[str, gw.Knob] = {
            name: DialKnob(gw.attr(config, name), "max" if name == "kl_coef" else "min") for name in KNOBS
        }
        self.restorable = True
        self.weight = 0.0

    def save(self, folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps(self.weight))

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:  # noqa: ARG002 - there is no data
        self.weight = json.loads((folder / "state.json").read_text())

    def inspect(self) -> list[gw.Check]:
        return []

    def measure(self) -> dict[str, float]:
        return {}

    def signals(self) -> dict[str, float]:
        return {}

    def arm(self, veto: Veto | None) -> None:
        pass

    def vetoed(self) -> list[str]:
        return []

    def pause(self, *, on: bool) -> None:
        pass

    def rebase(self) -> None:
        pass
