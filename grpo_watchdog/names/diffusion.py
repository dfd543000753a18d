"""Diffusion and flow models: DDPO, Flow-GRPO, DanceGRPO and probes in their style.

Read in kvablack/ddpo-pytorch: scripts/train.py; huggingface/trl 0.21.0: trl/trainer/ddpo_trainer.py;
yifan123/flow_grpo: scripts/train_sd3.py, flow_grpo/stat_tracking.py. The log-prob is of one denoising step, a mean over
its dimensions; the old policy is the one that sampled.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD = "current/reference", "current/old"
_STEPS = "mean over the denoising steps of the update"
_HALF_SQUARE = "half the squared log-ratio (k2)"
_CUMULATIVE = "over the samples of a range of denoising steps"

KEYS = (
    Key("reward_mean", "what the reward model gave", "", "", "mean over the samples of the epoch", "mean_reward"),
    Key("reward_avg", "what the reward models gave, weighted", "", "", "mean over the samples of the epoch",
        "mean_reward"),
    Key("reward_std", "spread of that", "", "", "std over the samples of the epoch", "std_reward"),
    Key("reward_std_mean", "spread within the samples of a prompt", "", "", "std within each prompt, mean over prompts",
        "group_std_reward"),
    Key("zero_std_ratio", "share of prompts whose samples have equal rewards", "", "", "over the prompts",
        "zero_std_fraction"),
    Key("approx_kl", "distance to the old policy [nats]", _OLD, _HALF_SQUARE, _STEPS),
    Key("clipfrac", "share of ratios outside the clip range", _OLD, "", _STEPS, "clip_fraction"),
    Key("clipped_frac", "share of ratios outside the clip range", _OLD, "", _STEPS, "clip_fraction"),
    Key("clip_fraction", "share of ratios outside the clip range", _OLD, "", _STEPS, "clip_fraction"),
    Key("clipfrac_*", "share of ratios beyond one end of the clip range", _OLD, "", _STEPS),
    Key("ratio_mean", "ratio to the old policy", _OLD, "", _STEPS, "mean_ratio"),
    Key("mean_ratio", "ratio to the old policy", _OLD, "", _STEPS, "mean_ratio"),
    Key("policy_loss", "the clipped surrogate, as it is minimised", "", "", _STEPS, "policy_loss"),
    # Of the means of two Gaussians, in units of their common variance.
    Key("kl_loss", "KL of a denoising step to the reference, before its coefficient", _REF,
        "exact, of two Gaussians of one variance", f"mean over dimensions; {_STEPS}", "kl"),
    Key("loss", "what is minimised", "", "", _STEPS, "loss"),
    Key("cum/*/log_ratio_abs_max", "greatest log-ratio to where the probe began [nats]", _OLD, "", f"max {_CUMULATIVE}",
        "max_abs_log_ratio", join="largest"),
    Key("cum/*/ratio_mean", "ratio to where the probe began", _OLD, "", f"mean {_CUMULATIVE}", "mean_ratio",
        join="mean"),
    Key("cum/*/log_ratio_mean", "log-ratio to where the probe began [nats]", _OLD, "", f"mean {_CUMULATIVE}",
        "log_ratio", join="mean"),
    Key("cum/*/clip_fraction", "share of ratios outside the clip range", _OLD, "", f"mean {_CUMULATIVE}",
        "clip_fraction", join="mean"),
    Key("epoch*/loss", "what is minimised, by the inner epoch", "", "", _STEPS, "loss", join="mean"),
    Key("epoch*/mean_ratio", "ratio to the old policy, by the inner epoch", _OLD, "", _STEPS, "mean_ratio",
        join="mean"),
    Key("epoch*/clipped_frac", "share of ratios outside the clip range, by the inner epoch", _OLD, "", _STEPS,
        "clip_fraction", join="mean"),
    Key("optimizer/grad_norm", "global L2 norm of the gradient", "", "", "one per update", "grad_norm"),
    Key("optimizer/loss", "what is minimised", "", "", "one per update", "loss"),
    Key("optimizer/approx_kl", "distance to the old policy [nats]", _OLD, _HALF_SQUARE, "one per update"),
    Key("fixed_reward/reward_total", "reward on a fixed set of prompts, all terms", "", "", "mean over samples",
        "mean_reward"),
    *(Key(name, "counts, terms of the reward, further statistics") for name in (
        "cum/*", "local_timestep_metrics/*", "optimizer/*", "fixed_reward/*", "logprob_alignment/*", "epoch",
        "inner_epoch", "group_size", "trained_prompt_num", "effective_lora_delta_norm", "reward_*", "eval_reward_*",
        "kl_abs", "kl", "advantages", "actual_batch_size", "mean_reward_*",
    )),
)  # fmt: skip

DIFFUSION = Family(
    "diffusion",
    "DDPO, Flow-GRPO and the like",
    KEYS,
    marks=("approx_kl & clipfrac & reward_mean", "reward_mean & inner_epoch", "cum/*/ratio_mean", "clipfrac_gt_one",
           "zero_std_ratio", "trained_prompt_num", "epoch*/clipped_frac", "local_timestep_metrics/*",
           "reward_avg & clipfrac", "inner_epoch & clipfrac"),
    prefixes=("train/",),
    notes="""\
- `approx_kl` is half the squared log-ratio to the old policy: neither a KL to the reference nor the k3 that step_kl is.
- The log-ratio is per dimension of a denoising step; small clip ranges (1e-4) are usual.""",
    last=PLAIN,
)  # fmt: skip
