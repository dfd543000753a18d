"""slime (and its fork miles): Megatron and SGLang.

Read in THUDM/slime: slime/backends/megatron_utils/loss.py, slime/backends/megatron_utils/data.py, slime/ray/rollout.py,
slime/utils/ppo_utils.py (compute_approx_kl).
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_SAMPLES = "mean per token of each sample, mean over samples"

KEYS = (
    Key("rollout/raw_reward", "what the reward function gave", "", "", "mean over samples", "mean_reward"),
    # After the group's mean is taken off: near 0 by construction.
    Key("rollout/rewards", "reward after normalisation within its group", "", "", "mean over samples"),
    Key("rollout/advantages", "advantage", "", "", _SAMPLES, "mean_advantage"),
    Key("rollout/kl", "KL to the reference, as shaped into the advantage [nats]", _REF,
        "kl_loss_type or k1; 0 with kl_coef=0", _SAMPLES),
    Key("rollout/log_probs", "log-prob of the old policy [nats]", "", "", _SAMPLES),
    Key("rollout/ref_log_probs", "log-prob of the reference [nats]", "", "", _SAMPLES),
    Key("train/loss", "what is minimised", "", "", _SAMPLES, "loss"),
    Key("train/pg_loss", "the clipped surrogate, as it is minimised", "", "", _SAMPLES, "policy_loss"),
    Key("train/entropy_loss", "entropy [nats]: of positive sign, whatever its name says", "", "", _SAMPLES, "entropy"),
    Key("train/pg_clipfrac", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _SAMPLES, "clip_fraction"),
    Key("train/ppo_kl", "minus the log-ratio to the old policy [nats]: no KL to the reference", _OLD, "k1", _SAMPLES,
        "log_ratio", factor=-1.0),
    Key("train/kl_loss", "KL as it stands in the loss, before its coefficient [nats]", _REF,
        "kl_loss_type: k1, k2, k3 or low_var_kl; the last clamped to -10..10 a token", _SAMPLES, "kl",
        "without use_kl_loss"),
    Key("train/train_rollout_logprob_abs_diff", "log-prob of the trainer against the engine's [nats]", _SAMPLER,
        "absolute difference", _SAMPLES, "sampler_mismatch"),
    Key("train/value_loss", "loss of the critic", "", "", _SAMPLES, "value_loss", "no critic"),
    Key("train/grad_norm", "global L2 norm of the gradient before clipping", "", "", "one per update", "grad_norm"),
    Key("train/lr-pg_0", "learning rate of the first parameter group", "", "", "one per update", "learning_rate"),
    Key("rollout/response_len/mean", "tokens of the response", "", "", "mean over samples", "completion_length"),
    Key("rollout/response_len/max", "tokens of the longest response", "", "", "max over samples",
        "max_completion_length"),
    Key("rollout/response_len/min", "tokens of the shortest response", "", "", "min over samples",
        "min_completion_length"),
    Key("rollout/response_lengths", "tokens of the response", "", "", "mean over samples", "completion_length"),
    Key("rollout/truncated_ratio", "share of samples cut at the limit", "", "", "mean over samples",
        "truncated_fraction"),
    Key("rollout/truncated", "share of samples cut at the limit", "", "", "mean over samples", "truncated_fraction"),
    *(Key(name, "counts, times, weights, further statistics") for name in (
        "train/lr-*", "train/tis*", "train/ois", "train/mis_*", "train/epoch", "train/step", "train/global_batch_size",
        "train/value_clipfrac", "train/opsm_clipfrac", "rollout/step", "rollout/returns", "rollout/values",
        "rollout/response_len/*", "rollout/zero_std/*", "rollout/total_lengths", "rollout/repetition_frac",
        "rollout/correct_*", "rollout/incorrect_*", "rollout/episode_*", "rollout/rollout_log_probs",
        "rollout/error_cat/*",
        "rollout/teacher_log_probs", "rollout/opd_*", "rollout/entropy", "rollout/prefix_cache_*", "rollout/spec_*",
        "rollout/fully_async/*", "rollout/num_*", "perf/*", "eval/*", "multi_turn/*", "passrate/*",
    )),
)  # fmt: skip

SLIME = Family(
    "slime",
    "slime",
    KEYS,
    marks=("rollout/raw_reward", "train/pg_clipfrac", "train/ppo_kl", "rollout/response_len/mean", "train/lr-pg_0",
           "train/pg_loss", "train/train_rollout_logprob_abs_diff", "rollout/truncated_ratio", "rollout/zero_std/*"),
    last=PLAIN,
)  # fmt: skip
