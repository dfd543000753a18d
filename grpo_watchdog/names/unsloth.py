"""Unsloth: TRL's GRPOTrainer as Unsloth rewrites it, and the table that its notebooks show.

Read in unsloth_zoo 2026.10.9: unsloth_zoo/rl_replacements.py (grpo_compute_loss), and in what its published notebooks
printed.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family
from grpo_watchdog.names.plain import PLAIN
from grpo_watchdog.names.trl import rows

UNSLOTH = Family(
    "unsloth",
    "Unsloth's GRPOTrainer",
    rows(),
    marks=("!Training Loss & reward", "!Training Loss & reward_std", "!completion_length & completions/mean_length"),
    prefixes=("train/",),
    notes="""\
- The keys are TRL's, of the version that it was installed with; beside `completions/mean_length` it goes on writing
  `completion_length`.
- `kl` is k3 per token: the mean of each sequence first, then over the sequences. 2026.10 clamps it to 10 a token, where
  older notebooks show thousands.""",
    last=PLAIN,
)
