"""What the trainers of TRL and transformers write to their logs, as a table, and which of it is a canonical metric.

A name says little: `kl` is k3 per token in one trainer, k1 per token in another, a clamped sum a sequence in a third.
Read in TRL 1.16 and transformers 5.24; the comments give lines of TRL's grpo_trainer.py unless another file is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from grpo_watchdog.names.family import Key

NOTES = """\
- A value is averaged over everything since the last log, each micro-batch (or generation batch) counting alike: with
  `logging_steps` > 1, the default, no row is a single step's but for `grad_norm` and `learning_rate`.
- GRPO and RLOO leave NaN out of that average, so a row with one NaN step shows the mean of the others; a row of nothing
  but NaN holds None. SFT, DPO, KTO and Reward average NaN in.
- `loss` shows no NaN or infinity while `logging_nan_inf_filter` is on (the default): such a micro-batch counts as a
  share of the sum so far; a step of one micro-batch, logged by itself, shows 0.
- What is taken at generation is missing from rows in which nothing was generated: with `steps_per_generation` x
  `num_iterations` > `gradient_accumulation_steps` these are most rows.
- Log-probs, entropies and KL of GRPO and RLOO are those of the policy at the sampling temperature.
- Where `gradient_accumulation_steps` is a multiple of `steps_per_generation` x `num_iterations`, as it is by default,
  the old policy is the current one: every ratio is 1 and `clip_ratio/*` is 0 by construction.
- Not in the tables: what a reward function passes to `log_metric` (under the name that it chose, which may be one of
  the trainer's) and, in evaluation, the same keys with the prefix `eval_`.
"""

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_MICRO, _BATCH = "each micro-batch, all processes", "generation batch, all processes"
_PER_TOKEN = f"mean per token of {_MICRO}"
_PER_SEQUENCE = f"mean over the sequences of {_MICRO}"
_SHARE = "share of tokens (of sequences with importance_sampling_level='sequence') of " + _MICRO
_MEAN, _LEAST, _MOST = (f"{how} over the {_BATCH}" for how in ("mean", "min", "max"))
_SPREAD = f"std (ddof 1) over the {_BATCH}, groups mixed"
_MOE = "dense models; router_aux_loss_coef=0"
_DRAWN = "rows in which nothing was generated"
_NO_CLIP = "loss_type cispo, sapo, vespo"
_NO_VLLM = f"use_vllm=False or vllm_importance_sampling_correction=False; {_DRAWN}"
_NO_BONUS = "entropy_coef=0 without use_adaptive_entropy"
_RATIO = "exp of the difference (of its sum, in sequence_* modes), after the cap (*_truncate) or zeroing (*_mask)"
_LOW, _HIGH = "ratio < 1 - epsilon and advantage < 0", "ratio > 1 + epsilon_high and advantage > 0"
_EITHER = "either of them: where the clip acts, which is less than the ratios outside its range"
_MISMATCH = "log-prob of the trainer at generation against the engine's [nats]"
_ABSOLUTE = "absolute difference, unclamped; tokens without an engine's log-prob left out"
_UNSEEN = "include_num_input_tokens_seen='no', the default"
_DATA_LOG_RATIO = "beta x log-ratio on the data set's completions, not the policy's own: no KL estimate"
_SUM = f"sum over the sequence, {_PER_SEQUENCE}"


def _table(*keys: Key) -> dict[str, Key]:
    return {key.key: key for key in keys}


# transformers/trainer.py: 1920 (the filter), 1937 (the norm), 1947 (the rate), 2262, 4201.
_EVERY = _table(
    Key("loss", "what is minimised, from whatever terms the trainer adds", "", "",
        "sum over the micro-batches of a step as scaled for accumulation, mean over processes and steps", "loss"),
    Key("grad_norm", "global L2 norm of the gradient before clipping", "", "", "that of the row's last step",
        "grad_norm", "DeepSpeed where its engine has none"),
    Key("learning_rate", "the scheduler's rate of the first parameter group: what a callback wrote into the optimizer "
        "does not show", "", "", "that of the row's last step"),
    Key("epoch", "passes over the data so far", "", "", "at the row"),
    Key("step", "optimizer steps so far (log_history alone has it)", "", "", "at the row"),
    Key("num_input_tokens_seen", "tokens of the inputs so far", "", "", "running total", None, _UNSEEN),
    Key("train_runtime", "time since training began [s]", "", "", "at the row", None, _UNSEEN),
    Key("train_tokens_per_second", "those tokens over that time", "", "", "since training began", None, _UNSEEN),
)  # fmt: skip

_AUX = Key("aux_loss", "load-balancing loss of the router, before its coefficient", "", "",
           "mean over processes of each micro-batch", None, _MOE)  # fmt: skip
_ENTROPY = Key("entropy", "entropy at each unmasked token [nats]", "", "", _PER_TOKEN, "entropy")

_SAMPLED = _table(
    Key("step_time", "time in training_step, generation and rewards included, optimizer.step not [s]", "", "",
        "sum over the micro-batches of a step"),
    Key("num_tokens", "prompt and completion tokens so far", "", "", "running total, all processes", None, _DRAWN),
    Key("completions/mean_length", "tokens that the policy generated, results of tools left out", "", "", _MEAN,
        "completion_length", _DRAWN),
    Key("completions/min_length", "tokens of the shortest completion", "", "", _LEAST, None, _DRAWN),
    Key("completions/max_length", "tokens of the longest completion", "", "", _MOST, None, _DRAWN),
    Key("completions/clipped_ratio", "share of completions whose last token is neither EOS nor padding: cut at the "
        "limit", "", "", _MEAN, "truncated_fraction", _DRAWN),
    *(Key(f"completions/{how}_terminated_length", "tokens of completions that ended by themselves; 0 if none did", "",
          "", reduction, None, _DRAWN) for how, reduction in (("mean", _MEAN), ("min", _LEAST), ("max", _MOST))),
    Key("rewards/*/mean", "what one reward function gave, before its weight; functions of one name share the key", "",
        "", f"{_MEAN}, None and NaN left out", None, _DRAWN),
    Key("rewards/*/std", "spread of what one reward function gave", "", "", _SPREAD, None, _DRAWN),
    Key("reward", "weighted sum of all reward functions, raw: no scaling, clipping or KL", "", "",
        f"{_MEAN}, completions that no function scored left out", "mean_reward", _DRAWN),
    # Over the whole batch, so it stays up while every group collapses, as long as groups differ (2829).
    Key("reward_std", "spread of that weighted sum", "", "", _SPREAD, "std_reward", _DRAWN),
    _ENTROPY, _AUX,
)  # fmt: skip

_GRPO = _table(
    Key("frac_reward_zero_std", "share of completions whose group has equal rewards; with scale_rewards='batch' or "
        "normalize_then_sum 1 where the whole batch is equal, else 0", "", "", _MEAN, "zero_std_fraction", _DRAWN,
        "scale_rewards 'group' or 'none', with sum_then_normalize"),
    # The ratio is in the logged value too, so this is k3 by itself only where ratios are 1 (3104).
    Key("kl", "KL as it stands in the loss, before beta [nats]", _REF, "k3, unclamped; times the ratio with "
        "use_bias_correction_kl, the default", _PER_TOKEN, "kl", "beta=0, the default"),
    Key("clip_ratio/low_mean", _LOW, _OLD, "", _SHARE, None, _NO_CLIP),
    Key("clip_ratio/high_mean", f"{_HIGH}; delta caps the ratio first", _OLD, "", _SHARE, None, _NO_CLIP),
    Key("clip_ratio/region_mean", _EITHER, _OLD, "", _SHARE, None, _NO_CLIP),
    Key("clip_ratio/low_min", f"share of tokens with {_LOW}", _OLD, "", f"min over the sequences of {_MICRO}", None,
        _NO_CLIP),
    Key("clip_ratio/high_max", f"share of tokens with {_HIGH}", _OLD, "", f"max over the sequences of {_MICRO}", None,
        _NO_CLIP),
    # Its bound is epsilon_high itself, not 1 + epsilon_high (3285).
    Key("cispo_clip_ratio", "ratio > epsilon_high (not 1 + it) and advantage > 0", _OLD, "", _SHARE, None,
        "loss_type other than cispo"),
    Key("vespo/phi_seq_mean", "weight that a sequence's loss is multiplied by", _OLD, "log-ratio clamped to -20..20 a "
        "token, -18.4..20 a sequence; times trainer/sampler with vLLM", _PER_SEQUENCE, None,
        "loss_type other than vespo"),
    # Taken before the division by the micro-batches for some losses, after it for the others (3153 to 3182).
    Key("policy_loss", "the loss, beta x KL included, before entropy bonus and router loss; of opposite sign to the "
        "canonical policy_loss", "", "", "each micro-batch's, mean over processes; with dapo, cispo, vespo its share "
        "of the step's, so that only their sum is the step's", None, _NO_BONUS),
    Key("entropy_coef", "weight of the entropy bonus, as the adaptive control leaves it for the next step; while "
        "entropy is above its target 0 is applied, whatever this says", "", "", "one per step", None, _NO_BONUS),
    Key("tools/call_frequency", "tool calls per completion", "", "", _MEAN, None, f"no tools; {_DRAWN}"),
    Key("tools/failure_frequency", "share of tool calls that failed; 0 where none was made", "", "",
        f"over the calls of the {_BATCH}", None, f"no tools; {_DRAWN}"),
    Key("sampling/sampling_logp_difference/mean", _MISMATCH, _SAMPLER, _ABSOLUTE,
        "mean per token of the generation batch, mean over processes", "sampler_mismatch", _NO_VLLM),
    Key("sampling/sampling_logp_difference/max", _MISMATCH, _SAMPLER, _ABSOLUTE, f"max per token of the {_BATCH}", None,
        _NO_VLLM),
    *(Key(f"sampling/importance_sampling_ratio/{how}", "weight that corrects for the sampler, as applied", _SAMPLER,
          _RATIO, f"{how} over the {_BATCH}", None, _NO_VLLM) for how in ("min", "mean", "max")),
)  # fmt: skip

_RLOO_SHARE = "share of sequences of " + _MICRO
_RLOO = _table(
    # The KL penalty and reward_clip_range are in these rewards: with beta > 0 equal rewards hardly ever stay equal.
    Key("frac_reward_zero_std", "share of groups of equal rewards, after reward_clip_range and less beta x KL", "", "",
        f"over the groups of the {_BATCH}", "zero_std_fraction", _DRAWN, "beta=0 without reward_clip_range"),
    # The reward is charged the sum over each sequence; the log shows the mean per token (rloo_trainer.py 1671, 1716).
    Key("kl", "KL that is taken off the reward (there beta x the sum over the sequence), no term of the loss [nats]",
        _REF, "k1 of the policy at generation, unclamped, may be negative", f"mean per token of the {_BATCH}", "kl_k1",
        f"beta=0; {_DRAWN}"),
    # One ratio a sequence, exp of the sum over its tokens.
    Key("clip_ratio/low_mean", _LOW, _OLD, "", _RLOO_SHARE),
    Key("clip_ratio/high_mean", _HIGH, _OLD, "", _RLOO_SHARE),
    Key("clip_ratio/region_mean", _EITHER, _OLD, "", _RLOO_SHARE),
    Key("clip_ratio/low_min", f"1 where every sequence has {_LOW}, else 0", _OLD, "", f"min over {_MICRO}"),
    Key("clip_ratio/high_max", f"1 where any sequence has {_HIGH}, else 0", _OLD, "", f"max over {_MICRO}"),
)  # fmt: skip

_DATA = _table(
    Key("num_tokens", "tokens of the inputs so far, padding left out", "", "", "running total, all processes"),
    _ENTROPY, _AUX,
)  # fmt: skip
_PAIRED = {
    name: Key(name, means, pair, _DATA_LOG_RATIO if pair else "", reduction)
    for name, means, pair, reduction in (
        ("logits/chosen", "logits of chosen completions, mean over the vocabulary", "", _PER_TOKEN),
        ("logits/rejected", "logits of rejected completions, mean over the vocabulary", "", _PER_TOKEN),
        ("rewards/chosen", "implicit reward of chosen completions", _REF, _SUM),
        ("rewards/rejected", "implicit reward of rejected completions", _REF, _SUM),
        ("rewards/margins", "rewards/chosen less rewards/rejected", _REF, _SUM),
        ("logps/chosen", "log-prob of chosen completions [nats]", "", _SUM),
        ("logps/rejected", "log-prob of rejected completions [nats]", "", _SUM),
    )
}
_DPO_PAIRED = {  # dpo_trainer.py 1310
    name: key._replace(
        reduction=key.reduction.replace(_SUM, f"{_SUM}; with ld_alpha the longer one's tail weighs less")
    )
    for name, key in _PAIRED.items()
}
_KTO_PAIRED = {  # nansum: a NaN sequence pulls the mean towards 0 (kto_trainer.py 1528)
    name: key._replace(
        reduction=key.reduction.replace(_SUM, f"{_SUM}, where NaN counts as 0"),
        when="rows in which no micro-batch had one" + (" of each" if name.endswith("margins") else ""),
    )
    for name, key in _PAIRED.items()
}
_ACCURACY = Key("mean_token_accuracy", "share of tokens that the model holds likeliest", "", "", _PER_TOKEN)

FAMILIES: dict[str, dict[str, Key]] = {
    "Trainer": _EVERY,
    "GRPOTrainer": _EVERY | _SAMPLED | _GRPO,
    "RLOOTrainer": _EVERY | _SAMPLED | _RLOO,
    "SFTTrainer": _EVERY | _DATA | _table(_ACCURACY),
    "DPOTrainer": _EVERY | _DATA | _DPO_PAIRED | _table(
        _ACCURACY._replace(means="share of the chosen completions' tokens that the model holds likeliest"),
        Key("rewards/accuracies", "share of pairs whose chosen completion has the higher implicit reward", _REF,
            _DATA_LOG_RATIO, _PER_SEQUENCE),
    ),
    "KTOTrainer": _EVERY | _DATA | _KTO_PAIRED | _table(
        # Completions are paired with other prompts than their own: no KL of the policy's samples (kto_trainer.py 1443).
        Key("kl", "the loss's reference point, from completions of other prompts; 0 with apo_zero_unpaired [nats]",
            _REF, "k1 on mismatched data, clamped at 0 after averaging", _SUM),
    ),
    # Its mean_reward is an output of the model that is trained, not a reward that a policy earns.
    "RewardTrainer": _EVERY | _table(
        _DATA["num_tokens"],
        *(Key(f"{how}_reward", "output of the reward model, chosen and rejected together", "", "",
              f"{how} over {_MICRO}") for how in ("min", "mean", "max")),
        Key("accuracy", "share of pairs whose chosen completion scores higher", "", "", _PER_SEQUENCE),
        Key("margin", "score of the chosen less that of the rejected completion", "", "", _PER_SEQUENCE),
    ),
}  # fmt: skip
KEYS = FAMILIES["GRPOTrainer"] | {key: row for key, row in _RLOO.items() if key not in _GRPO}

_HOLDS: dict[tuple[str, str], Callable[[Any], bool]] = {  # for keys with `only`
    ("GRPOTrainer", "frac_reward_zero_std"): lambda s: (
        s.scale_rewards in {"group", "none"} and s.multi_objective_aggregation == "sum_then_normalize"
    ),
    ("RLOOTrainer", "frac_reward_zero_std"): lambda s: s.beta == 0.0 and not s.reward_clip_range,
}


def known(trainer: str, key: str) -> Key | None:
    """Return what a key of a trainer's log means, or None where the table has nothing on it.

    Args:
        trainer: the name of the trainer's class; one that the table lacks is taken as transformers.Trainer.
        key: as it stands in the log.
    """
    rows = FAMILIES.get(trainer, _EVERY)
    if key in rows:
        return rows[key]
    return next((row for name, row in rows.items() if "*" in name and fnmatchcase(key, name)), None)


def canonical(trainer: str, logs: Mapping[str, float | None], settings: object = None) -> dict[str, float]:
    """Return the canonical metrics of a row of logs: what is exactly one, and nothing that only resembles one.

    It holds for rows of one step (`logging_steps=1`); longer ones are averages, as NOTES says.

    Args:
        trainer: the name of the trainer's class; one that the table lacks is taken as transformers.Trainer.
        logs: the row. None stands for nothing but NaN, and is told as NaN.
        settings: the trainer's arguments (its `args`); without them, what depends on them is left out.
    """
    found: dict[str, float] = {}
    for key, value in logs.items():
        row = known(trainer, key)
        if row is None or row.canonical is None:
            continue
        if not row.only or (settings is not None and _HOLDS[trainer, row.key](settings)):
            found[row.canonical] = math.nan if value is None else float(value)
    return found


def as_markdown() -> str:
    """Return the tables as Markdown, each family's rows beside those that it shares with one above it."""
    parts = [NOTES.rstrip()]
    for trainer, rows in FAMILIES.items():
        above = "GRPOTrainer" if trainer == "RLOOTrainer" else "Trainer"
        shared = {} if trainer == "Trainer" else {k: r for k, r in rows.items() if FAMILIES[above].get(k) == r}
        parts.append(f"### {trainer if trainer != 'Trainer' else 'Every trainer (transformers.Trainer)'}")
        if shared:
            parts.append(f"As {above}: {', '.join(f'`{key}`' for key in shared)}. Beside these:")
        parts.append("\n".join([_HEAD, *(_line(row) for key, row in rows.items() if key not in shared)]))
    return "\n\n".join(parts) + "\n"


_HEAD = "| key | what it is | pair | estimator | reduction | the watchdog's | missing |\n|---|---|---|---|---|---|---|"


def _line(row: Key) -> str:
    ours = f"`{row.canonical}`" if row.canonical else ""
    ours += f" ({row.only})" if row.only else ""
    cells = (f"`{row.key}`", row.means, row.pair, row.estimator, row.reduction, ours, row.when)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
