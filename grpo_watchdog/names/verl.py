"""verl: PPO, GRPO and the other estimators of its ray trainer.

Read in volcengine/verl: verl/trainer/ppo/metric_utils.py, verl/trainer/ppo/core_algos.py,
verl/trainer/ppo/ray_trainer.py, verl/workers/actor/dp_actor.py, verl/trainer/ppo/rollout_corr_helper.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

REF, OLD, SAMPLER = "current/reference", "current/old", "trainer/sampler"
TOKENS = "mean per token of each micro-batch (loss_agg_mode), then over these"
BATCH = "over the sequences of the batch"
ABORTED = "aborted samples left out in newer versions"

KEYS = (
    Key("critic/score/mean", "what the reward function gave", "", "", f"mean {BATCH}; {ABORTED}", "mean_reward"),
    # token_level_rewards: the score, less the penalty where use_kl_in_reward.
    Key("critic/rewards/mean", "the score less the KL penalty, where that is in the reward", "", "", f"mean {BATCH}",
        "mean_reward"),
    Key("critic/score/*", "greatest and least score", "", "", BATCH),
    Key("critic/rewards/*", "greatest and least reward", "", "", BATCH),
    Key("critic/advantages/mean", "advantage", "", "", "mean over the tokens of the batch", "mean_advantage"),
    Key("critic/advantages/*", "greatest and least advantage", "", "", "over the tokens of the batch"),
    Key("critic/returns/*", "returns", "", "", "over the tokens of the batch"),
    Key("critic/values/*", "values", "", "", "over the tokens of the batch"),
    Key("actor/kl_loss", "KL as it stands in the loss, before its coefficient [nats]", REF,
        "kl_loss_type: low_var_kl (k3) by default, clamped to -10..10 a token, as is low_var_kl+", TOKENS, "kl",
        "use_kl_loss=False, the default", clamped=(0.0, 10.0), also="token_kl"),
    Key("actor/kl_coef", "weight of that KL in the loss", "", "", "one per step", "kl_coef"),
    # apply_kl_penalty: mean over the tokens of each sequence, then over the sequences.
    Key("critic/kl", "KL that is taken off the reward, before its coefficient [nats]", REF,
        "kl_penalty: k1 by default, may be negative", "mean per token of each sequence, mean over sequences", "kl_k1",
        "versions from 0.2 on, which call it actor/reward_kl_penalty"),
    Key("actor/reward_kl_penalty", "KL that is taken off the reward, before its coefficient [nats]", REF,
        "kl_penalty: k1 by default, may be negative", "mean per token of each sequence, mean over sequences", "kl_k1",
        "use_kl_in_reward=False, the default"),
    Key("critic/kl_coeff", "weight of the KL penalty in the reward", "", "", "one per step", "kl_coef"),
    Key("actor/reward_kl_penalty_coeff", "weight of the KL penalty in the reward", "", "", "one per step", "kl_coef"),
    Key("actor/ppo_kl", "minus the log-ratio to the old policy [nats]: no KL to the reference", OLD,
        "k1, clamped to -20..20 a token; 0 on the first update of a batch", TOKENS, "log_ratio", factor=-1.0,
        clamped=(-20.0, 20.0)),
    Key("actor/pg_loss", "the clipped surrogate, as it is minimised", "", "", TOKENS, "policy_loss"),
    Key("actor/pg_clipfrac", "share of tokens at which the clip acts", OLD, "at most the share outside its range",
        TOKENS, "clip_fraction"),
    Key("actor/pg_clipfrac_lower", "share of tokens at which the dual clip acts", OLD, "", TOKENS),
    Key("actor/entropy", "entropy [nats]", "", "", TOKENS, "entropy"),
    Key("actor/entropy_loss", "entropy [nats]: of positive sign, whatever its name says", "", "", TOKENS, "entropy",
        "newer versions, which call it actor/entropy"),
    Key("actor/grad_norm", "global L2 norm of the actor's gradient before clipping", "", "",
        "mean over the updates of the step", "grad_norm"),
    Key("actor/lr", "learning rate of the actor", "", "", "at the end of the step", "learning_rate"),
    Key("actor/lr(1e-4)", "learning rate of the actor in units of 1e-4", "", "", "at the end of the step",
        "learning_rate", "versions from 0.2 on", factor=1e-4),
    Key("actor/loss", "what is minimised", "", "", TOKENS, "loss"),
    Key("critic/vf_loss", "loss of the critic, clipped", "", "", TOKENS, "value_loss", "no critic"),
    Key("response_length/mean", "tokens of the response, those of tools among them", "", "", f"mean {BATCH}",
        "completion_length"),
    Key("response_length/max", "tokens of the longest response", "", "", f"max {BATCH}", "max_completion_length"),
    Key("response_length/min", "tokens of the shortest response", "", "", f"min {BATCH}", "min_completion_length"),
    Key("response_length/clip_ratio", "share of responses as long as the longest that is allowed", "", "",
        f"mean {BATCH}", "truncated_fraction"),
    Key("rollout_corr/*", "weights and distances of the trainer's log-probs to the sampler's", SAMPLER, "", BATCH),
    # In probability, not in nats: no sampler_mismatch.
    Key("training/rollout_*", "differences of probabilities to the sampler's", SAMPLER, "absolute, in probability",
        "over the tokens of the batch"),
    Key("rollout_is_*", "weights and distances of the trainer's log-probs to the sampler's", SAMPLER, "", BATCH),
    Key("mismatch/*", "distances of the trainer's log-probs to the sampler's", SAMPLER, "", BATCH),
    *(Key(name, "counts, times, settings, evaluations") for name in (
        "critic/vf_clipfrac", "critic/vpred_mean", "critic/grad_norm", "critic/lr", "critic/lr(1e-4)",
        "critic/vf_explained_var", "actor/reward_kl_*", "training/global_step", "training/epoch",
        "training/num_gen_batches",
        "response_length_non_aborted/*", "response/aborted_ratio", "prompt_length/*", "timing*", "perf/*", "mfu/*",
        "global_seqlen/*", "num_turns/*", "tool_call_counts/*", "val-*", "val/*", "test_score/*", "fully_async/*",
    )),
)  # fmt: skip

VERL = Family(
    "verl",
    "verl",
    KEYS,
    marks=(
        "actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "critic/score/mean", "critic/rewards/mean", "timing_s/*",
        "response_length/clip_ratio", "critic/advantages/mean", "actor/entropy_loss", "val-core/*", "global_seqlen/*",
    ),
    notes="""\
- Each value of the actor and the critic is a mean over the micro-batches and updates of a step.
- `actor/kl_loss` is clamped at 10 a token: a limit of 10 or more on it can never be reached.
- `actor/pg_loss` is taken with the sign of the loss, so that loss = policy_loss + kl_coef x KL - entropy bonus.""",
    last=PLAIN,
)  # fmt: skip
