"""DeepSpeed-Chat: step 3, PPO.

Read in deepspeedai/DeepSpeedExamples: applications/DeepSpeed-Chat/training/step3_rlhf_finetuning/main.py and
ppo_trainer.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Key
from grpo_watchdog.names.plain import PLAIN, Worded

_INNER = "mean over the inner iterations of the step"

KEYS = (
    Key("average_reward_score", "what the reward model gave", "", "", "mean over the batch", "mean_reward"),
    Key("reward", "what the reward model gave", "", "", "mean over the batch", "mean_reward"),
    Key("average_reward", "what the reward model gave", "", "", "mean over the batch", "mean_reward"),
    Key("ema_reward_score", "the same, smoothed", "", "", "exponential mean over steps"),
    Key("act_loss", "the clipped surrogate, as it is minimised", "", "", _INNER, "policy_loss"),
    Key("actor_loss", "the clipped surrogate, as it is minimised", "", "", "of the last inner iteration",
        "policy_loss"),
    Key("cri_loss", "loss of the critic", "", "", _INNER, "value_loss"),
    Key("critic_loss", "loss of the critic", "", "", "of the last inner iteration", "value_loss"),
    *(Key(name, "sums, counts, the loss on other data") for name in (
        "actor_loss_sum", "critic_loss_sum", "unsuper_loss", "unsupervised_loss", "unsup_loss", "pretrain_loss",
        "ppo_ep", "ppo_epoch", "epoch", "step", "iterations",
    )),
)  # fmt: skip

DEEPSPEED_CHAT = Worded(
    "deepspeed_chat",
    "DeepSpeed-Chat",
    KEYS,
    marks=("act_loss & cri_loss", "actor_loss & critic_loss & ppo_epoch", "average_reward_score", "unsuper_loss",
           "actor_loss_sum", "ppo_ep"),
    prefixes=("train/",),
    notes="""\
- No KL, entropy, length or gradient norm is logged: what needs them is blind.""",
    last=PLAIN,
)  # fmt: skip
