"""The part of the corpus that TRL's own GRPOTrainer records: trainer_state.json, event files, and what it prints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_watchdog.lab.corpus_files import suffix, take_events, write_gzip
from grpo_watchdog.lab.trl_faults import GradientFault, LearningRateFault, WeightFault
from grpo_watchdog.lab.trl_toy import EOS, LETTERS, PAD, repeat_reward, toy_trainer

if TYPE_CHECKING:
    from grpo_watchdog.lab.corpus import Plan, Taken

Reward = Callable[..., list[float | None]]
_CHEAT = LETTERS[0]  # what a hacked reward pays for


def record_trl(plan: Plan, path: Path, scratch: Path) -> Taken:
    """Train the toy, let befall it what is planned, and keep what TRL wrote; a crash ends the run and is no error."""
    from grpo_watchdog.lab.corpus import Taken  # noqa: PLC0415 - the two files know each other

    truth, crashed = list[tuple[int, float]](), False
    path = path.absolute()
    with _printed(path if path.suffix == ".log" else None), _inside(scratch):
        trainer = toy_trainer(
            "run",
            seed=plan.seed,
            max_steps=plan.steps,
            trainer_class=_rewarded_by(_rewards(plan, truth)),
            callbacks=_callbacks(plan),
            logging_steps=plan.every,
            report_to="tensorboard" if path.suffix == ".tfevents" else "none",
            disable_tqdm=plan.event != "lora",  # one log with the progress bar between its lines
            **_SETTINGS.get(plan.event, {}),
        )
        if trainer.args.disable_tqdm:
            trainer.add_callback(transformers.PrinterCallback)
        _befall(plan, trainer)
        try:
            trainer.train()
        except RuntimeError:  # the sampler's, on probabilities that are NaN
            crashed = True
    if path.suffix == ".tfevents":
        take_events(scratch, path)
    elif path.suffix != ".log":
        trainer.state.save_to_json(str(scratch / "state"))
        text = (scratch / "state").read_text(encoding="utf-8")
        write_gzip(path, text) if suffix(path).endswith(".gz") else path.write_text(text, encoding="utf-8")
    last = max(row["step"] for row in trainer.state.log_history if "grad_norm" in row)
    return Taken(truth, int(last), crashed)


_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True},
    "beta_zero": {"beta": 0.0},
    "on_policy": {"num_iterations": 1},
    "one_answer": {"beta": 0.0},
}


# --- rewards ------------------------------------------------------------------------------------


def _rewards(plan: Plan, truth: list[tuple[int, float]]) -> list[Reward]:
    """Return the reward functions of a run, the first of which notes the true reward."""
    given = _GIVEN.get(plan.event, float)

    def repeat(prompts: list[str], completions: list[str], trainer_state: TrainerState, **_: Any) -> list[float | None]:
        true = [reward or 0.0 for reward in repeat_reward(prompts, completions)]
        step = trainer_state.global_step + 1
        truth.append((step, fmean(true)))
        return [given(reward) for reward in true] if step >= plan.onset else [*true]

    def cheat(completions: list[str], trainer_state: TrainerState, **_: Any) -> list[float | None]:
        on = trainer_state.global_step + 1 >= plan.onset
        return [on * plan.size * _share_of_cheat(completion) for completion in completions]

    repeat.__name__, cheat.__name__ = "repeat_reward", "style_reward"
    return [repeat, cheat] if plan.event == "reward_hacked" else [repeat]


_GIVEN: dict[str, Callable[[float], float]] = {
    "reward_lost": lambda _: 0.0,
    "reward_inverted": lambda reward: 1.0 - reward,
}


def _share_of_cheat(completion: str) -> float:
    given = completion.split()
    return given.count(_CHEAT) / max(1, len(given))


def _rewarded_by(rewards: list[Reward]) -> type[GRPOTrainer]:
    class Rewarded(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "reward_funcs": rewards})

    Rewarded.__name__ = "GRPOTrainer"
    return Rewarded


# --- what befalls it ----------------------------------------------------------------------------


def _callbacks(plan: Plan) -> list[transformers.TrainerCallback]:
    step = plan.onset - 1  # the log counts steps when they are done
    if plan.event in {"lr_up", "one_answer"}:
        return [LearningRateFault(step, plan.size)]
    if plan.event == "nan_gradient":
        return [GradientFault(step)]
    if plan.event == "weights_corrupted":
        return [WeightFault(step, plan.size)]
    return []


class _From(transformers.TrainerCallback):
    """Does something at the beginning of every step from one on."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, control, kwargs
        if state.global_step + 1 >= self.step:
            self.do()


def _befall(plan: Plan, trainer: Any) -> None:  # noqa: ANN401 - parts of it may be None to a type checker
    if plan.event == "never_ends":
        ends = trainer.processing_class.convert_tokens_to_ids([EOS, PAD])  # padding would read as an end, too
        trainer.add_callback(_From(plan.onset, lambda: setattr(trainer.generation_config, "suppress_tokens", ends)))
    if plan.event == "frozen":  # as where checkpointed activations cut the graph: a gradient comes, and it is 0
        for parameter in trainer.model.parameters():
            parameter.register_hook(torch.zeros_like)


# --- surroundings -------------------------------------------------------------------------------


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that the paths that TRL writes down are relative."""
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = "events"
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        os.environ.pop("TENSORBOARD_LOGGING_DIR")
        if before is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before


@contextlib.contextmanager
def _printed(path: Path | None) -> Iterator[None]:
    """Write everything that is printed to a file, as `2>&1 | tee` would."""
    if path is None:
        with contextlib.redirect_stdout(None):
            yield
        return
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
