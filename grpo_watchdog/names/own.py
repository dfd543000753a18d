"""Own: the canonical names themselves, as in this project's journal and in the trainer of the documented incident."""

from __future__ import annotations

from grpo_watchdog.metrics import METRICS
from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

OWN = Family(
    "canonical",
    "Canonical names: the journal, the documented trainer",
    (Key(m.name, m.formula, m.pair, "", m.reduction, m.name) for m in METRICS.values()),
    marks=("mean_log_prob_current", "mean_log_prob_ref", "kl_penalty & mean_ratio", "mean_advantage & std_reward",
           "max_abs_log_ratio & ess", "weights_touched", "param_change & mean_reward", "kl_coef & mean_reward",
           "zero_std_fraction & mean_reward"),
    ratio_to="reference",
    last=PLAIN,
)  # fmt: skip
