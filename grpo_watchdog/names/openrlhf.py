"""OpenRLHF: PPO, REINFORCE++, RLOO and GRPO of its ray trainer.

Read in OpenRLHF/OpenRLHF: openrlhf/trainer/ray/ppo_actor.py, openrlhf/trainer/ppo_trainer.py,
openrlhf/trainer/ppo_utils/experience_maker.py, openrlhf/models/loss.py, openrlhf/models/utils.py (compute_approx_kl).
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_TOKENS = "mean per token of each micro-batch, then over the batches of the step"
_SEQUENCES = "mean over the samples of the step"
_CLAMPED = "clamped to -10..10 a token, whatever the estimator"

KEYS = (
    Key("reward", "what the reward model or function gave, before shaping", "", "", _SEQUENCES, "mean_reward"),
    Key("score", "what the reward function reports as its score", "", "", _SEQUENCES),
    Key("rm", "the reward, as a progress bar of older versions calls it", "", "", _SEQUENCES, "mean_reward"),
    Key("group_reward_std", "spread of the rewards within a group", "", "", "std within each group, mean over groups",
        "group_std_reward", "n_samples_per_prompt=1"),
    # k1 by default: kl_estimator of k2 or k3 is never below 0.
    Key("kl", "KL to the reference [nats]", _REF, f"k1 by default, k2 or k3 as kl_estimator says; {_CLAMPED}", _TOKENS,
        "kl", "init_kl_coef=0 logs 0", clamped=(-10.0, 10.0)),
    Key("ppo_kl", "minus the log-ratio to the old policy [nats]", _OLD, "k1, unclamped", _TOKENS, "log_ratio",
        factor=-1.0),
    Key("ppo_clip_ratio", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _TOKENS, "clip_fraction"),
    Key("vllm_kl", "log-prob of the engine less that of the trainer [nats]", _SAMPLER, "k1, signed", _TOKENS, None,
        "without the correction for the engine"),
    Key("policy_loss", "the clipped surrogate, as it is minimised, without KL and entropy", "", "", _TOKENS,
        "policy_loss"),
    Key("act_loss", "the same, in the progress bar", "", "", _TOKENS, "policy_loss"),
    Key("pg", "the same, in the progress bar of older versions", "", "", _TOKENS, "policy_loss"),
    Key("critic_loss", "loss of the critic", "", "", _TOKENS, "value_loss", "no critic"),
    Key("cri", "the same, in the progress bar of older versions", "", "", _TOKENS, "value_loss", "no critic"),
    Key("entropy_loss", "entropy [nats]: of positive sign, whatever its name says", "", "", _TOKENS, "entropy",
        "entropy_loss_coef not given"),
    Key("ent_loss", "the same, in the progress bar", "", "", _TOKENS, "entropy"),
    Key("response_length", "tokens of the response", "", "", _SEQUENCES, "completion_length"),
    Key("gen_len", "the same, in the progress bar", "", "", _SEQUENCES, "completion_length"),
    Key("glen", "the same, in the progress bar of older versions", "", "", _SEQUENCES, "completion_length"),
    Key("truncated", "share of responses cut at the limit", "", "", _SEQUENCES, "truncated_fraction"),
    Key("actor_lr", "learning rate of the actor", "", "", "at the end of the step", "learning_rate"),
    Key("act_lr", "the same, in the progress bar", "", "", "at the end of the step", "learning_rate"),
    Key("actor_grad_norm", "global L2 norm of the actor's gradient", "", "", "one per update, mean over the step",
        "grad_norm", "versions that do not log it"),
    *(Key(name, "counts, times, sums, of the critic") for name in (
        "return", "ret", "total_length", "tot_len", "tlen", "critic_lr", "cri_lr", "values", "vals", "ptx_loss", "ptx",
        "aux_loss", "num_actions", "generated_samples", "dynamic_filtering_pass_rate", "timing/*", "eval*",
        "is_filter_ratio", "critic_grad_norm", "consumed_samples", "epoch", "global_step",
    )),
)  # fmt: skip

OPENRLHF = Family(
    "openrlhf",
    "OpenRLHF",
    KEYS,
    marks=("policy_loss & actor_lr", "ppo_clip_ratio", "response_length & total_length", "act_loss & gen_len",
           "pg & glen", "vllm_kl", "return & total_length", "actor_lr & return"),
    prefixes=("train/",),
    notes="""\
- `kl` is clamped at 10 a token in either direction: a limit of 10 or more on it can never be reached.""",
    last=PLAIN,
)  # fmt: skip
