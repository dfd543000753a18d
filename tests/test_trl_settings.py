"""Settings that hide something: each is said, and none of them raises an alarm in a healthy run."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import torch

import grpo_watchdog as gw
from trl_runs import same, toy

# what is set, what is said of it at attach, and the rules that are blind in consequence
BLINDING: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "beta 0": ({"beta": 0.0}, "there is no reference model", {"kl_penalty"}),
    "beta 0, lora": ({"beta": 0.0, "lora": True}, "a KL dose switches it on", {"kl_penalty"}),
    "on-policy": ({"num_iterations": 1}, "the ratio is 1 by construction", {"log_ratio", "mean_ratio"}),
    "nothing at all": ({"beta": 0.0, "num_iterations": 1}, "the ratio is 1", {"log_ratio", "mean_ratio", "kl_penalty"}),
    "logging": ({"logging_steps": 10}, "the two differ", set()),
    "scale none": ({"scale_rewards": "none"}, "scale_rewards is none", set()),
    "scale batch": ({"scale_rewards": "batch"}, "scale_rewards is batch", set()),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "does not clip the ratio", {"policy_loss"}),
    "sapo": ({"loss_type": "sapo"}, "does not clip the ratio", {"policy_loss"}),
    "vespo": ({"loss_type": "vespo"}, "does not clip the ratio", {"policy_loss"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, "scale_rewards is none", set()),
    "sequences": ({"importance_sampling_level": "sequence"}, "one a sequence", set()),
    "entropy bonus": ({"entropy_coef": 0.001}, "terms beside the policy's", {"policy_loss"}),
    "quantile": ({"top_entropy_quantile": 0.5}, "terms beside the policy's", {"policy_loss"}),
    "delta": ({"delta": 1.5}, "those before that cap", set()),
    "truncated are masked": ({"mask_truncated_completions": True}, "out of the loss", set()),
    "groups of two": ({"num_generations": 2}, "every |advantage| is about 0.71", set()),
    "groups of three": ({"num_generations": 3, "per_device_train_batch_size": 30}, "come by chance", set()),
    "lora": ({"lora": True}, "the base model with the adapters off", set()),
    "reference that moves": (
        {"sync_ref_model": True, "ref_model_sync_steps": 5, "ref_model_mixup_alpha": 0.5},
        "moves the reference on purpose",
        set(),
    ),
    "no clipping of gradients": ({"max_grad_norm": 0.0}, "gradients are not clipped", set()),
    "few checkpoints": (
        {"save_total_limit": 1, "save_strategy": "steps", "save_steps": 5},
        "are kept beyond it",
        set(),
    ),
}  # fmt: skip
LONG = {"nothing at all", "cispo", "scale batch", "lora"}


def watched(folder: Path, rules: str, steps: int, **settings: Any) -> tuple[gw.Watchdog, list[Any]]:
    trainer = toy(folder, max_steps=steps, **settings)
    dog = gw.attach(trainer, rules=rules)
    seen: list[Any] = []
    dog._listeners.append(lambda step, verdict: seen.append((step, verdict)))  # noqa: SLF001
    trainer.train()
    return dog, seen


@pytest.mark.parametrize("name", BLINDING)
def test_what_a_setting_hides_is_said_and_no_alarm_is_raised(tmp_path: Path, name: str) -> None:
    settings, told, blind = BLINDING[name]
    dog, seen = watched(tmp_path, "documented", 25, **settings)
    assert told in "\n".join(dog.briefing)
    assert dog.run_dir is not None
    assert told in gw.report(dog.run_dir).replace("\n  ", " ")
    assert blind <= {found.rule for found in dog.blind()}
    assert {verdict.level for _, verdict in seen} <= {"ok", "notice"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in LONG else pytest.mark.slow) for n in BLINDING])
@pytest.mark.timeout(300)
def test_a_healthy_run_is_left_alone(tmp_path: Path, name: str) -> None:
    _, seen = watched(tmp_path, "guarded", 120, **BLINDING[name][0])
    done = {outcome.action for _, verdict in seen for outcome in verdict.actions}
    assert done <= {"checkpoint_now", "shorten_probation"}
    loud = [(step.number, [f.rule for f in v.findings]) for step, v in seen if v.level in ("warning", "critical")]
    assert loud == []


TIMED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}


@functools.cache
def left_alone(rules: str | None, *, lora: bool) -> dict[str, Any]:
    """Return all that 60 steps leave behind, in the model, the optimizer, the generators and the log."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = toy(Path(folder), max_steps=60, lora=lora)
        if rules is not None:
            gw.attach(trainer, rules=rules)
        trainer.train()
    generators = {
        "torch": torch.get_rng_state(),
        "python": repr(random.getstate()),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002 - the one that a trainer seeds
    }
    log = [{name: value for name, value in row.items() if name not in TIMED} for row in trainer.state.log_history]
    states = {"weights": trainer.model, "optimizer": trainer.optimizer, "schedule": trainer.lr_scheduler}
    return {name: dict(owner.state_dict()) for name, owner in states.items()} | generators | {"log": log}


@pytest.mark.parametrize("rules", ["documented", "guarded"])
@pytest.mark.parametrize("lora", [False, True])
def test_where_nothing_fires_the_run_is_the_same_to_the_last_bit(rules: str, *, lora: bool) -> None:
    bare, hooked = left_alone(None, lora=lora), left_alone(rules, lora=lora)
    assert len(bare["log"]) == 61
    assert [name for name in bare if not same(bare[name], hooked[name])] == []


def test_without_such_settings_less_is_said(tmp_path: Path) -> None:
    dog = gw.attach(toy(tmp_path), rules="guarded")
    said = "\n".join(dog.briefing)
    assert not any(told in said for _, told, _ in BLINDING.values() if told != "the two differ")
    assert "rulebook guarded_llm in place of guarded" in said


def test_vllm_that_is_set_and_absent_is_survived(tmp_path: Path) -> None:
    """The trainer itself refuses to be built without the engine; one that says so later is watched all the same."""
    trainer: Any = toy(tmp_path, max_steps=6)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    trainer.vllm_importance_sampling_clip_max = 3.0
    dog = gw.attach(trainer, rules="guarded")
    assert "importance ratios are capped at 3" in "\n".join(dog.briefing)
    trainer.use_vllm = False
    trainer.train()
    assert "sampler_mismatch" in {found.rule for found in dog.blind()}


def test_beta_can_be_switched_on_under_lora_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    trainer: Any = toy(tmp_path, max_steps=8, lora=True, beta=0.0, num_iterations=4)
    dog = gw.attach(trainer, rules="guarded")
    seen: list[bool] = []

    def dose(step: Any, _: object) -> None:  # noqa: ANN401
        seen.append("kl" in step.values)
        if step.number == 2:
            dog._actuator.knobs["kl_coef"].hold(0.5)  # noqa: SLF001

    dog._listeners.append(dose)  # noqa: SLF001
    trainer.train()
    assert trainer.beta == 0.5
    assert seen == [False, False, True, True, True, True, True, True]
