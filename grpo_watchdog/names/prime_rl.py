"""prime-rl: the trainer's log and the orchestrator's, which are two runs of one training.

Read in PrimeIntellect-ai/prime-rl: src/prime_rl/trainer/rl/train.py, src/prime_rl/orchestrator/orchestrator.py, docs/.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_SAMPLER = "trainer/sampler"
_TOKENS = "mean over the trained tokens of the step"
_ROLLOUTS = "mean over the rollouts of each example, mean over examples"

KEYS = (
    Key("reward/all/mean", "what the environments gave", "", "", _ROLLOUTS, "mean_reward"),
    Key("reward/mean", "what the environment gave", "", "", "mean over rollouts", "mean_reward"),
    Key("loss/mean", "what is minimised", "", "", _TOKENS, "loss"),
    Key("entropy/mean", "entropy [nats]", "", "", _TOKENS, "entropy"),
    Key("entropy/all/mean", "entropy [nats]", "", "", _TOKENS, "entropy"),
    # k3 of the trainer to the engine whose policy may be some steps old: no KL to a reference.
    Key("mismatch_kl/mean", "KL to the (older) policy of the engine [nats]", _SAMPLER, "k3", _TOKENS),
    Key("mismatch_kl/all/mean", "KL to the (older) policy of the engine [nats]", _SAMPLER, "k3", _TOKENS),
    Key("teacher_kl/mean", "KL to a teacher [nats]", "current/teacher", "", _TOKENS),
    Key("importance_ratio/mean", "ratio to the engine's policy", "current/old", "", _TOKENS, "mean_ratio"),
    Key("is_masked/mean", "share of tokens that the ratio's bounds take out of the loss", "current/old", "", _TOKENS,
        "clip_fraction"),
    Key("optim/grad_norm", "global L2 norm of the gradient before clipping", "", "", "one per step", "grad_norm"),
    Key("optim/lr", "learning rate", "", "", "one per step", "learning_rate"),
    Key("seq_len/all/mean", "tokens of prompt and response", "", "", _ROLLOUTS),
    Key("decode_len/all/mean", "generated tokens", "", "", _ROLLOUTS, "completion_length"),
    Key("completion_len/all/mean", "generated tokens", "", "", _ROLLOUTS, "completion_length"),
    Key("is_truncated/all/mean", "share of rollouts cut at the limit", "", "", _ROLLOUTS, "truncated_fraction"),
    Key("is_truncated/mean", "share of rollouts cut at the limit", "", "", "mean over rollouts", "truncated_fraction"),
    # The console's line.
    Key("Loss", "what is minimised", "", "", _TOKENS, "loss"),
    Key("Entropy", "entropy [nats]", "", "", _TOKENS, "entropy"),
    Key("Mismatch KL", "KL to the (older) policy of the engine [nats]", _SAMPLER, "k3", _TOKENS),
    Key("Grad. Norm", "global L2 norm of the gradient before clipping", "", "", "one per step", "grad_norm"),
    Key("LR", "learning rate", "", "", "one per step", "learning_rate"),
    Key("Reward", "what the environments gave", "", "", "mean over rollouts", "mean_reward"),
    *(Key(name, "counts, times, shares, further statistics") for name in (
        "*/std", "*/max", "*/min", "*/median", "*/all/*", "perf/*", "time/*", "progress/*", "optim/zero_grad_ratio",
        "solve_*", "batch/*", "eval/*", "metrics/*", "scheduler/*", "error/*", "errored_rollouts/*", "empty_rollouts/*",
        "event_loop_lag/*", "filters/*", "off_policy_level/*", "reward/*", "masked_*", "unmasked_*", "is_masked*",
        "seq_len/*", "decode_len/*", "num_turns/*", "kl_ent_ratio/*", "max_vio/*", "system/*", "sampling/*",
        "is_truncated/*",
        "Time", "Throughput", "MFU", "Peak Mem.", "Max Vio", "Seq. Length", "Async Level", "geo_*",
        "importance_ratio/*",
    )),
)  # fmt: skip

PRIME_RL = Family(
    "prime_rl",
    "prime-rl",
    KEYS,
    marks=("mismatch_kl/mean", "mismatch_kl/all/mean", "loss/mean & entropy/mean", "optim/grad_norm & loss/mean",
           "reward/all/mean", "optim/zero_grad_ratio", "solve_none/all", "solve_none", "progress/ckpt_step",
           "Mismatch KL",
           "masked_mismatch_kl/mean"),
    last=PLAIN,
)  # fmt: skip
