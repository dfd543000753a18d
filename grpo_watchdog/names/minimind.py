"""MiniMind: its own GRPO and PPO loops.

Read in jingyaogong/minimind: trainer/train_grpo.py, trainer/train_ppo.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Key
from grpo_watchdog.names.plain import PLAIN, Worded

_REF, _OLD = "current/reference", "current/old"
_TOKENS = "mean per token of the batch"

KEYS = (
    Key("reward", "reward model's score and rules together", "", "", "mean over the batch", "mean_reward"),
    # train_grpo.py logs mean(log p_reference - log p_current): k1 with the sign turned.
    Key("kl_ref", "log p_reference - log p_current [nats]", _REF, "k1, of opposite sign", _TOKENS, "kl_k1",
        "GRPO of older versions", "GRPO", factor=-1.0, without="critic_loss"),
    Key("kl_ref", "distance to the reference [nats]", _REF, "k1, of a sign that differs between versions", _TOKENS,
        only="PPO", beside="critic_loss"),
    Key("kl", "distance to the old policy [nats], in PPO", _OLD, "k1", _TOKENS, beside="critic_loss"),
    Key("approx_kl", "distance to the old policy [nats]", _OLD, "", _TOKENS),
    Key("clipfrac", "share of ratios outside the clip range", _OLD, "", _TOKENS, "clip_fraction"),
    Key("adv_std", "spread of the advantages", "", "", "std over the batch", "std_advantage"),
    Key("advantages_std", "spread of the advantages", "", "", "std over the batch", "std_advantage"),
    Key("adv_mean", "advantage", "", "", "mean over the batch", "mean_advantage"),
    Key("advantages_mean", "advantage", "", "", "mean over the batch", "mean_advantage"),
    # GRPO's is the whole loss with its KL, PPO's the surrogate alone.
    Key("actor_loss", "the surrogate, as it is minimised, beta x KL (k3) included", "", "",
        "mean per token of each sequence, mean over these", "loss", "", "GRPO", without="critic_loss"),
    Key("policy_loss", "the same, as it is logged to a server", "", "",
        "mean per token of each sequence, mean over these", "loss", "", "GRPO", without="critic_loss"),
    Key("actor_loss", "the clipped surrogate, as it is minimised", "", "", _TOKENS, "policy_loss", "", "PPO",
        beside="critic_loss"),
    Key("policy_loss", "the clipped surrogate, as it is minimised", "", "", _TOKENS, "policy_loss", "", "PPO",
        beside="critic_loss"),
    Key("critic_loss", "loss of the critic", "", "", _TOKENS, "value_loss", "GRPO"),
    Key("avg_response_len", "tokens of the response", "", "", "mean over the batch", "completion_length"),
    Key("learning_rate", "learning rate", "", "", "one per step", "learning_rate"),
    Key("actor_lr", "learning rate of the actor", "", "", "one per step", "learning_rate"),
    Key("lr", "learning rate", "", "", "one per step", "learning_rate"),
    *(Key(name, "counts, of the critic, of the router") for name in (
        "critic_lr", "aux_loss", "epoch", "step", "eta_min",
    )),
)  # fmt: skip

MINIMIND = Worded(
    "minimind",
    "MiniMind",
    KEYS,
    marks=("kl_ref & avg_response_len", "avg_response_len & actor_loss", "adv_std & adv_mean & avg_response_len",
           "advantages_std & advantages_mean & avg_response_len"),
    notes="""\
- The gradient norm and the entropy are not logged: what needs them is blind.""",
    last=PLAIN,
)  # fmt: skip
