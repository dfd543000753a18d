"""TRL's PPOTrainer, RLOOTrainer and OnlineDPOTrainer that log `objective/*`, and the PPOTrainer before them.

Read in huggingface/trl 0.11.4, 0.14.0, 0.16.0, 0.17.0 and 0.23.0: trl/trainer/ppo_trainer.py, rloo_trainer.py (0.17.0),
online_dpo_trainer.py (0.17.0).
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD = "current/reference", "current/old"
_SUM = "sum over the tokens of each response, mean over responses"
_UPDATES = "mean over all updates of the batch"

KEYS = (
    # 0.17: k1 unless kl_estimator='k3'; 0.11.4: kl_penalty 'kl' (k1) by default, 'abs', 'mse' and 'full' besides.
    Key("objective/kl", "KL that is taken off the reward, before its coefficient [nats]", _REF,
        "k1 by default, may be negative; 2 to 12 is common", _SUM, "kl_penalty"),
    Key("objective/kl_coef", "weight of that KL", "", "", "one per step", "kl_coef"),
    Key("objective/entropy", "minus the log-prob of the response [nats]: a sum, no entropy per token", "", "", _SUM),
    Key("objective/scores", "what the reward model gave", "", "", "mean over responses", "mean_reward"),
    Key("objective/rlhf_reward", "score less the KL penalty", "", "", "mean over responses", "mean_reward"),
    Key("objective/non_score_reward", "minus the KL penalty, times its coefficient", _REF, "", _SUM),
    Key("objective/scores_margin", "score of the chosen less that of the rejected", "", "", "mean over pairs"),
    Key("env/reward_mean", "what the reward model gave", "", "", "mean over responses", "mean_reward"),
    Key("env/reward_std", "spread of that", "", "", "std over responses", "std_reward"),
    Key("ppo/mean_scores", "what the reward model gave", "", "", "mean over responses", "mean_reward"),
    Key("ppo/std_scores", "spread of that", "", "", "std over responses", "std_reward"),
    Key("policy/approxkl_avg", "half the squared log-ratio to the old policy [nats]", _OLD,
        "k2: near k3 while it is small, so no step_kl", _UPDATES),
    Key("ppo/policy/approxkl", "half the squared log-ratio to the old policy [nats]", _OLD, "k2", _UPDATES),
    Key("ppo/policy/policykl", "minus the log-ratio to the old policy [nats]", _OLD, "k1", _UPDATES, "log_ratio",
        factor=-1.0),
    Key("policy/clipfrac_avg", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _UPDATES, "clip_fraction"),
    Key("ppo/policy/clipfrac", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _UPDATES, "clip_fraction"),
    Key("policy/entropy_avg", "entropy per token [nats], padding among it", "", "", _UPDATES, "entropy"),
    Key("ppo/policy/entropy", "entropy per token [nats]", "", "", _UPDATES, "entropy"),
    Key("ppo/policy/advantages_mean", "advantage", "", "", _UPDATES, "mean_advantage"),
    Key("val/ratio", "ratio to the old policy", _OLD, "", _UPDATES, "mean_ratio"),
    Key("loss/policy_avg", "the clipped surrogate, as it is minimised", "", "", _UPDATES, "policy_loss"),
    Key("ppo/loss/policy", "the clipped surrogate, as it is minimised", "", "", _UPDATES, "policy_loss"),
    Key("loss/value_avg", "loss of the value head", "", "", _UPDATES, "value_loss"),
    Key("ppo/loss/value", "loss of the value head", "", "", _UPDATES, "value_loss"),
    Key("ppo/loss/total", "what is minimised", "", "", _UPDATES, "loss"),
    Key("lr", "learning rate", "", "", "one per step", "learning_rate"),
    Key("ppo/learning_rate", "learning rate", "", "", "one per step", "learning_rate"),
    Key("tokens/responses_len_mean", "tokens of the responses", "", "", "mean over responses", "completion_length"),
    Key("ratio_mean", "ratio to the old policy", _OLD, "", "mean of a minibatch", "mean_ratio"),
    *(Key(name, "counts, times, spreads, of the value head, of an evaluation") for name in (
        "eps", "episode", "val/*", "ppo/val/*", "ppo/returns/*", "ppo/policy/*", "ppo/mean_non_score_reward", "time/*",
        "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs", "tokens/*", "env/reward_dist", "logps/*",
        "rewards/*", "logits/*", "beta",
    )),
)  # fmt: skip

TRL_PPO = Family(
    "trl_ppo",
    "TRL PPOTrainer",
    KEYS,
    marks=("objective/kl", "objective/scores", "policy/approxkl_avg", "val/ratio", "loss/policy_avg", "ppo/mean_scores",
           "ppo/policy/approxkl", "env/reward_mean & ppo/loss/policy", "objective/rlhf_reward"),
    prefixes=("train/",),
    notes="""\
- `objective/kl` and `objective/entropy` are sums over the tokens of a response: they grow with their number.""",
    last=PLAIN,
)  # fmt: skip
