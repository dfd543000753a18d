"""ms-swift: its own GRPOTrainer, with TRL's names.

Read in modelscope/ms-swift: swift/trainers/rlhf_trainer/grpo_trainer.py (log_rewards_metrics).
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN
from grpo_watchdog.names.trl import rows

_GROUPS = "std within each group, mean over groups; over the batch with scale_rewards='batch'"

KEYS = (
    Key("reward_std", "spread of the weighted sum of the reward functions", "", "", _GROUPS, "group_std_reward"),
    *(line for line in rows() if line.key != "reward_std"),
    *(Key(name, "counts and times of the progress line") for name in (
        "memory(GiB)", "train_speed(iter/s)", "train_speed(s/it)", "global_step/max_steps", "percentage",
        "elapsed_time", "remaining_time", "num_total_requests", "gen_step_time",
    )),
)  # fmt: skip

MS_SWIFT = Family(
    "ms_swift",
    "ms-swift",
    KEYS,
    marks=("!memory(GiB) & reward", "!train_speed(iter/s) & reward", "!train_speed(s/it) & reward"),
    prefixes=("train/",),
    notes="""\
- The keys are TRL's; `reward_std` is always that of the groups, whatever the version.""",
    last=PLAIN,
)  # fmt: skip
