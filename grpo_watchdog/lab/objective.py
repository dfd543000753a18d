"""The objective of a GRPO step: the clipped surrogate, and what restrains it.

Shapes by suffix, beside those of `grpo`: U what a ratio is taken of (the whole trajectory: 1, or tokens: K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_watchdog.metrics import RatioTo

LOG_RATIO_CLAMP = 20.0  # [nats], the document's clamp; the incident's mean_ratio is exp(20)


@dataclass(kw_only=True)
class GrpoConfig:
    """Settings that every task has; mutable on purpose: the trainer reads its knobs on every step.

    `kl_gradient` is the estimator of the KL to the reference whose gradient the penalty has: k1 (log_ratio; zero in
    expectation, noise that grows with `kl_coef`), k2 (log_ratio^2 / 2) or k3 (exp(-log_ratio) - 1 + log_ratio).
    """

    learning_rate: float  # peak, before the schedule
    kl_coef: float  # weight of the KL penalty (TRL: beta); read on every step
    kl_gradient: Literal["k1", "k2", "k3"]
    prompts: int  # prompts per step, P
    group_size: int  # samples per prompt, G, over which advantages are normalised
    total_steps: int  # length of the learning-rate schedule [steps]
    ratio_to: RatioTo = "old"  # policy that the surrogate ratio is taken to
    clip_epsilon: float = 0.2  # half-width of the surrogate's clip range; read on every step
    entropy_coef: float = 0.0  # weight of the entropy bonus, where a task has an entropy; read on every step
    warmup_steps: int = 20  # linear warm-up of the learning rate, at least 1 [steps]
    final_lr_fraction: float = 0.05  # learning rate at the schedule's end, as a fraction of the peak
    max_grad_norm: float | None = 1.0  # gradient-norm clip, None for none
    pass_mark: float | None = None  # where given, a reward is 1 from this mark on, else 0


class Score(NamedTuple):
    """What a network says about a rollout."""

    log_prob_BK: Tensor  # of each step or token [nats], float64; 0 where the mask is
    entropy: Tensor | None = None  # mean per token [nats]


class Loss(NamedTuple):
    """One step's objective and what is logged of it."""

    objective: Tensor  # what the gradient is of
    metrics: dict[str, Tensor]


def surrogate(
    config: GrpoConfig, advantage_B1: Tensor, current: Score, reference: Score, mask_BU: Tensor | None
) -> Loss:
    """Return the objective of one on-policy step, with the terms that it is made of.

    Args:
        config: the settings; read here and now.
        advantage_B1: one advantage per sample.
        current: log-probs of the units under the policy, with gradient.
        reference: the same under the reference.
        mask_BU: 1 where a unit counts; None where all do.
    """
    from_ref_BU = current.log_prob_BK - reference.log_prob_BK
    to_reference = config.ratio_to == "reference"
    log_ratio_BU = from_ref_BU if to_reference else current.log_prob_BK - current.log_prob_BK.detach()
    ratio_BU = log_ratio_BU.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    low, high = 1.0 - config.clip_epsilon, 1.0 + config.clip_epsilon
    bounded_BU = ratio_BU.clamp(low, high)
    policy_loss = -mean_over(torch.minimum(ratio_BU * advantage_B1, bounded_BU * advantage_B1), mask_BU)
    kl_penalty = mean_over(from_ref_BU, mask_BU)
    restraint = _restraint(config, kl_penalty, from_ref_BU, mask_BU)
    objective = policy_loss + config.kl_coef * restraint
    # Clipped as TRL counts it: only where the clip takes the gradient away.
    clipped_BU = torch.where(advantage_B1 < 0.0, ratio_BU < low, ratio_BU > high)
    metrics = {
        "policy_loss": policy_loss,
        "kl_penalty": kl_penalty,
        "mean_ratio": mean_over(ratio_BU, mask_BU),
        "log_ratio": mean_over(log_ratio_BU, mask_BU),
        "clip_fraction": mean_over(clipped_BU.double(), mask_BU),
    }
    if to_reference:
        metrics |= {
            "loss": policy_loss + config.kl_coef * kl_penalty,
            "mean_log_prob_current": current.log_prob_BK.mean(),
            "mean_log_prob_ref": reference.log_prob_BK.mean(),
            "max_abs_log_ratio": log_ratio_BU.abs().max(),
        }
        return Loss(objective, metrics)
    if current.entropy is not None:
        objective = objective - config.entropy_coef * current.entropy
        metrics["entropy"] = current.entropy
    return Loss(objective, {**metrics, "loss": objective, "kl": restraint})


def _restraint(config: GrpoConfig, k1: Tensor, from_ref_BU: Tensor, mask_BU: Tensor | None) -> Tensor:
    if config.kl_gradient == "k1":
        return k1
    if config.kl_gradient == "k2":
        return 0.5 * mean_over(from_ref_BU.square(), mask_BU)
    return mean_over((-from_ref_BU).exp() - 1.0 + from_ref_BU, mask_BU)


def mean_over(value_BU: Tensor, mask_BU: Tensor | None) -> Tensor:
    """Return the mean of what counts."""
    return value_BU.mean() if mask_BU is None else (value_BU * mask_BU).sum() / mask_BU.sum()
