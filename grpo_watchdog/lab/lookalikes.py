"""What looks like trouble and is none: a watchdog that acts on these does harm."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_watchdog.lab.grpo import GrpoTraining
from grpo_watchdog.lab.injection import OLD_RATIO, Lookalike, put_back, replace_setting
from grpo_watchdog.lab.sampling import Rollout

_SPIKE = 20.0  # factor on the gradient of the one step that spikes
_WEAK_KL = 0.1  # factor on a KL coefficient that hardly holds
_FAST = 3.0  # factor on the learning rate of a run that is soon sure of itself
_EASY = {"chain": 1e-3, "tokens": 0.2}  # marks that a policy soon reaches with every sample


def _warm_restart(training: GrpoTraining, _severity: float) -> None:
    training.restarted_at = training.scheduler.last_epoch
    _follow_schedule(training)


def _follow_schedule(training: GrpoTraining) -> None:
    """Set the learning rate of the coming step to what the schedule says now."""
    scheduler = training.scheduler
    for group, peak, factor in zip(
        training.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(scheduler.last_epoch)


def _resume(training: GrpoTraining, _severity: float) -> None:
    training.load_state_dict(training.state_dict())


def _double_batch(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training.config, "prompts", training.config.prompts * 2)


def _halve_batch(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training.config, "prompts", training.config.prompts // 2)


def _old_batch(training: GrpoTraining) -> None:
    put_back(training, training.config, "prompts")


def _spike(training: GrpoTraining, _severity: float) -> None:
    generator = torch.Generator().manual_seed(training.seed)

    def permuted(_rollout: Rollout, reward_B: Tensor) -> Tensor:
        return reward_B[torch.randperm(reward_B.numel(), generator=generator)]

    def steep(gradients: list[Tensor]) -> list[Tensor]:
        return [gradient.mul_(_SPIKE) for gradient in gradients]

    training.interference["reward"] = permuted
    training.interference["gradient"] = steep


def _calm(training: GrpoTraining) -> None:
    training.interference.pop("reward", None)
    training.interference.pop("gradient", None)


def _weaken_kl(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training.config, "kl_coef", training.config.kl_coef * _WEAK_KL)


def _strong_kl(training: GrpoTraining) -> None:
    put_back(training, training.config, "kl_coef")


def _hurry(training: GrpoTraining, _severity: float) -> None:
    training.scheduler.base_lrs = [peak * _FAST for peak in training.scheduler.base_lrs]
    _follow_schedule(training)


def _do_not_hurry(training: GrpoTraining) -> None:
    peak = training.config.learning_rate
    training.scheduler.base_lrs = [peak for _ in training.scheduler.base_lrs]
    _follow_schedule(training)


def _ease(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training.config, "pass_mark", _EASY[training.task])
    _weaken_kl(training, _severity)  # which would pull some samples back over the mark
    _hurry(training, _severity)


def _as_hard_as_before(training: GrpoTraining) -> None:
    put_back(training, training.config, "pass_mark")
    _strong_kl(training)
    _do_not_hurry(training)


LOOKALIKES: dict[str, Lookalike] = {
    lookalike.name: lookalike
    for lookalike in (
        Lookalike("warm_restart", _warm_restart),
        Lookalike("resume", _resume),
        Lookalike("batch_doubled", _double_batch, _old_batch),
        Lookalike("batch_halved", _halve_batch, _old_batch),
        Lookalike("spike", _spike, _calm, lasts=1),
        Lookalike("kl_rises_with_reward", _weaken_kl, _strong_kl, OLD_RATIO, at_start=True),
        Lookalike("entropy_falls_with_reward", _hurry, _do_not_hurry, frozenset({"tokens"}), at_start=True),
        Lookalike("solved", _ease, _as_hard_as_before, frozenset(_EASY), at_start=True),
    )
}
