"""SkyRL: skyrl-train.

Read in NovaSky-AI/SkyRL: skyrl-train/skyrl_train/trainer.py, skyrl-train/skyrl_train/workers/worker.py,
skyrl-train/skyrl_train/utils/ppo_utils.py, skyrl-train/skyrl_train/generators/utils.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_TOKENS = "mean per token of each micro-batch, then over these"

KEYS = (
    Key("reward/avg_raw_reward", "what the environments gave", "", "", "mean over trajectories", "mean_reward"),
    Key("loss/avg_raw_rewards", "what the environments gave", "", "", "mean over trajectories", "mean_reward"),
    Key("loss/avg_final_rewards", "the same, less the KL penalty in the reward", "", "", "mean over trajectories",
        "mean_reward"),
    Key("loss/avg_raw_advantages", "advantage", "", "", "mean over the tokens of the batch", "mean_advantage"),
    Key("loss/avg_kl", "KL that is taken off the reward, before its coefficient [nats]", _REF,
        "kl_estimator_type: k3 by default, clamped to -10..10 a token",
        "mean per token of each sequence, mean over these", "kl", "use_kl_in_reward=False", clamped=(0.0, 10.0),
        also="token_kl"),
    Key("loss/kl_loss_coef", "weight of that KL", "", "", "one per step", "kl_coef"),
    Key("policy/final_loss", "what is minimised", "", "", _TOKENS, "loss"),
    Key("policy/policy_loss", "the clipped surrogate, as it is minimised", "", "", _TOKENS, "policy_loss"),
    Key("policy/policy_kl", "KL as it stands in the loss, before its coefficient [nats]", _REF,
        "kl_estimator_type: k3 by default, clamped to -10..10 a token",
        "mean per token of each sequence, mean over these", "kl", clamped=(0.0, 10.0), also="token_kl"),
    Key("policy/policy_entropy", "entropy [nats]", "", "", _TOKENS, "entropy"),
    Key("policy/ppo_clip_ratio", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _TOKENS, "clip_fraction"),
    Key("policy/raw_grad_norm", "global L2 norm of the gradient before clipping", "", "", "mean over the updates",
        "grad_norm"),
    Key("policy/grad_norm", "global L2 norm of the gradient before clipping", "", "", "mean over the updates",
        "grad_norm"),
    Key("policy/policy_lr", "learning rate of the policy", "", "", "at the end of the step", "learning_rate"),
    Key("critic/critic_loss", "loss of the critic", "", "", _TOKENS, "value_loss", "no critic"),
    Key("policy/rollout_train_logprobs_abs_diff_mean", "log-prob of the trainer against the engine's [nats]", _SAMPLER,
        "absolute difference", _TOKENS, "sampler_mismatch"),
    Key("generate/avg_num_tokens", "generated tokens", "", "", "mean over trajectories", "completion_length"),
    Key("generate/max_num_tokens", "most generated tokens", "", "", "max over trajectories", "max_completion_length"),
    Key("generate/min_num_tokens", "fewest generated tokens", "", "", "min over trajectories",
        "min_completion_length"),
    *(Key(name, "counts, times, further statistics") for name in (
        "reward/avg_pass_at_*", "reward/mean_positive_reward", "loss/avg_raw_advantages_abs", "loss/avg_kl_max",
        "policy/policy_update_steps", "policy/rollout_train_logprobs_abs_diff_*", "policy/loss_metrics/*", "critic/*",
        "policy/is_ratio_*", "generate/*", "timing/*", "trainer/*", "eval/*", "async/*", "environment/*", "vllm/*",
        "ray/*", "consumed/*", "system/*",
    )),
)  # fmt: skip

SKYRL = Family(
    "skyrl",
    "SkyRL",
    KEYS,
    marks=("reward/avg_raw_reward", "policy/policy_entropy", "policy/raw_grad_norm", "policy/final_loss",
           "loss/avg_final_rewards", "generate/avg_num_tokens", "policy/policy_update_steps", "policy/ppo_clip_ratio",
           "loss/avg_raw_rewards"),
    notes="""\
- Both KL are clamped at 10 a token: a limit of 10 or more on them can never be reached.""",
    last=PLAIN,
)  # fmt: skip
