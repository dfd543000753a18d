"""ROLL: the RLVR and agentic pipelines.

Read in alibaba/ROLL: roll/pipeline/rlvr/actor_worker.py, roll/pipeline/base_worker.py,
roll/pipeline/rlvr/rlvr_pipeline.py, roll/pipeline/agentic/agentic_pipeline.py, roll/utils/functionals.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_TOKENS = "mean per token (loss_agg_mode) of each micro-batch, then over these"
_BATCH = "over the sequences of the batch"

KEYS = (
    Key("critic/score/mean", "what the reward function gave", "", "", f"mean {_BATCH}", "mean_reward"),
    Key("critic/rewards/mean", "the reward after normalisation and KL", "", "", f"mean {_BATCH}", "mean_reward"),
    Key("critic/advantages/mean", "advantage", "", "", "mean over the tokens of the batch", "mean_advantage"),
    Key("critic/entropy/mean", "entropy at the log-probs of the old policy [nats]", "", "", "mean over tokens",
        "entropy"),
    Key("critic/kl", "KL of the old policy to the reference, as taken off the reward [nats]", _REF,
        "kl_penalty, k1 by default", "mean per token of each sequence, mean over sequences", "kl_k1"),
    Key("critic/kl_coef", "weight of that KL", "", "", "one per step", "kl_coef"),
    Key("actor/kl_loss", "KL as it stands in the loss, before its coefficient [nats]", _REF,
        "k3, clamped to -10..10 a token", _TOKENS, "kl", clamped=(0.0, 10.0), also="token_kl"),
    Key("actor/ratio_mean", "ratio to the old policy", _OLD, "", "mean per token of each sequence, then over these",
        "mean_ratio"),
    Key("actor/ratio_max", "greatest ratio to the old policy", _OLD, "",
        "max over the tokens of a micro-batch, then mean", "max_ratio"),
    Key("actor/ratio_min", "least ratio to the old policy", _OLD, "",
        "min over the tokens of a micro-batch, then mean", "min_ratio"),
    Key("actor/clipfrac", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _TOKENS, "clip_fraction"),
    # In older versions a mean over padding too: too small by the share of padding.
    Key("actor/ppo_ratio_*clipfrac", "share of ratios outside the clip range", _OLD, "", "mean, padding among it"),
    Key("actor/approxkl", "half the squared log-ratio to the old policy [nats]", _OLD, "k2 (mse)", _TOKENS),
    Key("actor/policykl", "log-ratio to the old policy [nats]", _OLD, "k1", _TOKENS, "log_ratio"),
    Key("actor/pg_loss", "the clipped surrogate, as it is minimised", "", "", _TOKENS, "policy_loss"),
    Key("actor/total_loss", "what is minimised", "", "", _TOKENS, "loss"),
    Key("actor/train_infer_diff_mean", "difference of probabilities to the engine's", _SAMPLER, "in probability",
        "mean per token"),
    Key("actor_train/grad_norm", "global L2 norm of the actor's gradient", "", "", "mean over the updates",
        "grad_norm"),
    Key("actor/lr", "learning rate of the actor", "", "", "one per step", "learning_rate"),
    Key("actor_train/lr", "learning rate of the actor", "", "", "one per step", "learning_rate"),
    Key("tokens/response_length/mean", "tokens of the response", "", "", f"mean {_BATCH}", "completion_length"),
    Key("tokens/response_length/max", "tokens of the longest response", "", "", f"max {_BATCH}",
        "max_completion_length"),
    Key("tokens/response_length/min", "tokens of the shortest response", "", "", f"min {_BATCH}",
        "min_completion_length"),
    *(Key(name, "counts, times, further statistics") for name in (
        "critic/score/*", "critic/rewards/*", "critic/advantages/*", "critic/raw_advantages/*", "critic/returns/*",
        "critic/values/*", "critic/ref_log_prob/*", "critic/old_log_prob/*", "critic/correct/*", "critic/lr",
        "actor/weighted_pg_loss", "actor/*samples", "actor/valid_sample_ratio", "actor/sample_weights_*",
        "actor/topr_*",
        "actor/postive_loss", "actor/*sft_loss", "actor/negative_tis_loss", "actor/train_infer_*", "actor_train/loss",
        "actor/rollout_importance_sampling_clip", "tokens/*", "token/*", "time/*", "system/*", "val/*", "val_*",
        "env/*",
        "global_seqlen/*", "scheduler/*",
    )),
)  # fmt: skip

ROLL = Family(
    "roll",
    "ROLL",
    KEYS,
    marks=("actor/ppo_ratio_clipfrac", "actor/policykl", "actor/approxkl & actor/pg_loss", "actor_train/grad_norm",
           "tokens/response_length/mean", "critic/ref_log_prob/mean", "actor/ratio_max & actor/clipfrac",
           "actor/train_infer_ratio_mean", "actor/total_loss & actor/pg_loss"),
    last=PLAIN,
)  # fmt: skip
