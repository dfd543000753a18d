"""AReaL: its PPO actor, used for GRPO and others.

Read in inclusionAI/AReaL: areal/engine/ppo/actor.py, areal/utils/functional.py, areal/utils/stats_tracker.py (which
adds /avg, /min and /max). Older versions write grpo_actor for ppo_actor.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_OLD, _SAMPLER = "current/old", "trainer/sampler"
_TOKENS = "mean over the valid tokens of an update, mean over the updates"
_SEQUENCES = "mean over the sequences of the batch"

KEYS = (
    Key("task_reward/avg", "what the reward function gave", "", "", _SEQUENCES, "mean_reward"),
    Key("rollout/reward", "what the reward function gave, as the rollouts come in", "", "", "mean over trajectories",
        "mean_reward"),
    # Of kl_ctl times the estimate: no KL by itself.
    Key("kl_rewards/*", "minus the KL to the reference, times its coefficient", "current/reference",
        "kl_estimator, k1 by default", "over the valid tokens"),
    Key("final_reward/*", "reward of a token with the KL penalty", "", "", "over the valid tokens"),
    Key("advantages/avg", "advantage", "", "", "mean over the valid tokens", "mean_advantage"),
    Key("update/importance_weight/avg", "ratio to the old (proximal) policy", _OLD, "", _TOKENS, "mean_ratio"),
    Key("update/importance_weight/max", "greatest ratio to the old (proximal) policy", _OLD, "", "max", "max_ratio"),
    Key("update/importance_weight/min", "least ratio to the old (proximal) policy", _OLD, "", "min", "min_ratio"),
    # stat["approx_kl"] is the log-ratio itself, detached.
    Key("update/approx_kl/avg", "log-ratio to the old (proximal) policy [nats]", _OLD, "log p_current - log p_old",
        _TOKENS, "log_ratio"),
    Key("update/clip_ratio/avg", "share of tokens at which the clip acts", _OLD, "at most the share outside its range",
        _TOKENS, "clip_fraction"),
    Key("update/entropy/avg", "entropy [nats]", "", "", _TOKENS, "entropy"),
    Key("update/actor_loss/avg", "the clipped surrogate, as it is minimised", "", "", _TOKENS, "policy_loss"),
    Key("update/grad_norm", "global L2 norm of the gradient", "", "", "mean over the updates", "grad_norm"),
    Key("update/lr", "learning rate", "", "", "mean over the updates", "learning_rate"),
    Key("no_eos_ratios/avg", "share of sequences that fill the batch's length", "", "", _SEQUENCES,
        "truncated_fraction"),
    Key("seq_len/*", "tokens of prompt and response", "", "", "over the sequences"),
    Key("eps_clip", "half-width of the clip range", "", "", "one per run", "clip_epsilon"),
    Key("update/behave_*", "ratio of the old policy to the one that sampled", _SAMPLER, "", "over the tokens kept"),
    *(Key(name, "counts, times, settings, further statistics") for name in (
        "update/importance_weight/*", "update/approx_kl/*", "update/clip_ratio/*", "update/dual_clip_ratio/*",
        "update/entropy/*", "update/actor_loss/*", "update/*_logp/*", "update/n_*", "update/clipped_*",
        "update/vocab_*", "update/dual_clipped_*", "update/unclipped_*", "update/update_*", "update/loss",
        "update/sapo_*", "update/*prox*", "update/version*", "task_reward/*", "rollout/*", "advantages/*",
        "correct_*", "incorrect_*", "prompt_len/*",
        "n_*", "timeperf/*", "timing/*", "no_eos_ratios/*", "mask_no_eos_with_zero", "use_dual_clip", "c_clip",
        "behav_imp_weight_cap",
        "eval-rollout/*", "ref/*", "compute_logp/*", "ppo_critic/*", "critic/*", "begin_of_trajectory/*", "version*/*",
    )),
)  # fmt: skip

AREAL = Family(
    "areal",
    "AReaL",
    KEYS,
    marks=("task_reward/avg", "update/importance_weight/avg", "update/actor_loss/avg", "update/approx_kl/avg",
           "timeperf/*", "no_eos_ratios/avg", "update/entropy/avg"),
    prefixes=("ppo_actor/", "grpo_actor/", "actor/"),
    notes="""\
- The length of the response alone is not logged: `seq_len` holds the prompt's too.""",
    last=PLAIN,
)  # fmt: skip
