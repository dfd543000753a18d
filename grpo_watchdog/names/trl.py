"""TRL: GRPOTrainer and RLOOTrainer of all versions, as their logs are read after the run.

The table of the newest version is `trl_keys`; this one adds what older versions wrote, and what the keys of a row tell
of the version. Read in huggingface/trl 0.14.0, 0.16.0, 0.17.0, 0.19.0, 0.21.0, 0.23.0, 0.25.0, 0.26.0, 0.27.0, 1.0.0
and 1.16: trl/trainer/grpo_trainer.py.
"""

from __future__ import annotations

from typing import Any

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN
from grpo_watchdog.names.trl_keys import KEYS

_REF, _OLD = "current/reference", "current/old"
_GROUPS = "std (ddof 1) within each group, mean over groups"
_BATCH = "std (ddof 1) over the generation batch, groups mixed"
_ACTS = "counts where the clip acts, at most the share outside its range"
_SPREAD = "spread of the weighted sum of the reward functions"
_TOKENS = "mean per token of each micro-batch, all processes"

# Until 0.25 the log has no step_time, and reward_std is that of the groups; from 0.27 on it is that of the batch. 0.26
# alone has both, and is taken as the later ones.
REWARD_STD = (
    Key("reward_std", _SPREAD, "", "", _BATCH, "std_reward", beside="step_time"),
    Key("reward_std", _SPREAD, "", "", _GROUPS, "group_std_reward", beside="grad_norm",
        only="rows of versions up to 0.25, unless scale_rewards='batch'"),
    Key("reward_std", _SPREAD, "", "", _GROUPS, "group_std_reward", beside="completion_length",
        without="completions/mean_length", only="versions up to 0.16"),
    Key("reward_std", _SPREAD, "", "", f"{_BATCH}; within groups up to 0.25", "std_reward"),
)  # fmt: skip

_LOGGED: dict[str, dict[str, Any]] = {  # what a recorded row is taken as, where the live table is strict
    "kl": {"also": "token_kl"},
    "frac_reward_zero_std": {"canonical": "zero_std_fraction"},
    "learning_rate": {"canonical": "learning_rate"},
    "completions/min_length": {"canonical": "min_completion_length"},
    "completions/max_length": {"canonical": "max_completion_length"},
    "clip_ratio/region_mean": {"canonical": "clip_fraction", "estimator": _ACTS},
}  # fmt: skip

OLDER = (
    Key("completion_length", "tokens that the policy generated", "", "", "mean over the batch", "completion_length",
        "versions from 0.17 on; Unsloth goes on writing it"),
    Key("clip_ratio", "ratio outside its range on the side where the clip acts", _OLD, _ACTS, _TOKENS, "clip_fraction",
        "versions before 0.15 and from 0.17 on"),
    Key("Training Loss", "what is minimised, as the table of a notebook calls it", "", "", "", "loss"),
    Key("rewards/*", "what one reward function gave, before its weight", "", "", "mean over the batch"),
    Key("eval_*", "of an evaluation"),
    Key("train_*", "of the summary at the end"),
    Key("total_flos", "of the summary at the end"),
    Key("profiling/*", "time that a part of the trainer took [s]"),
    Key("Validation Loss", "of an evaluation, as the table of a notebook calls it"),
)  # fmt: skip


def rows() -> tuple[Key, ...]:
    """Return the lines of the newest version as a recorded log is read, then those of the older ones."""
    newest = [line._replace(**_LOGGED.get(key, {})) for key, line in KEYS.items() if key != "reward_std"]
    return (*newest, *REWARD_STD, *OLDER)


TRL = Family(
    "trl",
    "TRL GRPOTrainer, RLOOTrainer",
    rows(),
    marks=(
        "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "clip_ratio/region_mean",
        "rewards/*/mean", "reward & reward_std & learning_rate", "completion_length & reward & kl",
        "sampling/sampling_logp_difference/mean", "reward & epoch & grad_norm",
    ),
    prefixes=("train/",),
    notes="""\
- `kl` of RLOOTrainer is k1 and may be negative; its logs have the same keys, so that it is read as GRPO's k3.
- `frac_reward_zero_std` is taken as scale_rewards='group' means it, the default.""",
    last=PLAIN,
)  # fmt: skip
