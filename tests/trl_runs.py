"""Short watched runs of the toy trainer, in which a rollback can be had at a step of one's choice."""
# ruff: noqa: ANN401 - what a trainer hands over is its own affair

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import grpo_watchdog as gw
from grpo_watchdog.lab import trl_toy
from grpo_watchdog.metrics import Step
from grpo_watchdog.verdict import Verdict

# Checkpoints after steps 1, 5, 9, 13 ...; each is proven two healthy steps later.
QUICK: dict[str, Any] = {"checkpoint_every": 4, "probation": 2, "recover_after": 1000, "ladder": [{"rollback": True}]}
DOSES: dict[str, Any] = {"rollback": True, "lower_learning_rate": 0.3, "raise_kl_coef": 3.0, "shrink_clip": 0.5}
ROWS = 512


class Watched(NamedTuple):
    trainer: Any
    dog: gw.Watchdog
    verdicts: list[Verdict]

    def back(self) -> dict[int, int]:
        """Return where each rollback went, by the step at which it happened."""
        return {v.step: v.rolled_back_to for v in self.verdicts if v.rolled_back_to is not None}

    def logged(self, name: str) -> dict[int, float]:
        return {int(row["step"]): row[name] for row in self.trainer.state.log_history if name in row}


class On(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls a function at one event of every step, with the step's number."""

    def __init__(self, event: str, act: Callable[[int], object]) -> None:
        def called(args: object, state: Any, control: object, **_: Any) -> None:
            del args, control
            act(state.global_step)

        setattr(self, event, called)


@functools.cache
def base(seed: int) -> Path:
    """Return the folder of a base model, which takes longer to make than these runs."""
    folder = Path(tempfile.mkdtemp())
    _WRITE(folder, seed)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_WRITE = trl_toy._write_base  # noqa: SLF001


def toy(folder: Path, **options: Any) -> Any:
    """Return a toy trainer, as fast as it can be had."""
    write = lambda where, seed: shutil.copytree(base(seed), where, dirs_exist_ok=True)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_toy, "_write_base", write)
        return trl_toy.toy_trainer(folder, **options)


def watched(
    folder: Path, *, callbacks: tuple[Any, ...] = (), policy: dict[str, Any] | None = None, **options: Any
) -> Watched:
    """Return a toy trainer and its watchdog; `rules`, `run_dir` and `resume` go to the latter."""
    given = {name: options.pop(name) for name in ("run_dir", "resume") if name in options}
    rules = options.pop("rules", "guarded")
    trainer = toy(folder, callbacks=callbacks, **{"max_steps": 24, **options})
    return watch(trainer, rules=rules, **given, **{**QUICK, **(policy or {})})


def watch(trainer: Any, **given: Any) -> Watched:
    """Attach, and keep what is told."""
    dog = gw.attach(trainer, **given)
    verdicts: list[Verdict] = []

    def keep(_: Step, verdict: Verdict) -> None:
        verdicts.append(verdict)

    dog._listeners.append(keep)  # noqa: SLF001
    return Watched(trainer, dog, verdicts)


def one_prompt(trainer: Any) -> Any:
    """Give a trainer one prompt, over and over: which rows come next makes no difference any more."""
    trainer.train_dataset = trainer.train_dataset.select([0] * ROWS)
    return trainer


def loaded(path: Path) -> Any:
    """Return a file of a checkpoint."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def same(one: Any, other: Any) -> bool:
    """Return whether two states are equal, to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
