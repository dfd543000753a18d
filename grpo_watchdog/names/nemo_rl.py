"""NeMo-RL: GRPO and PPO.

Read in NVIDIA-NeMo/RL: nemo_rl/algorithms/loss_functions.py (ClippedPGLossFn), nemo_rl/algorithms/grpo.py,
nemo_rl/algorithms/utils.py, nemo_rl/experience/rollouts.py.
"""

from __future__ import annotations

from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.plain import PLAIN

_REF, _OLD, _SAMPLER = "current/reference", "current/old", "trainer/sampler"
_TOKENS = "mean over the valid tokens of the step"

KEYS = (
    Key("reward", "what the environment gave", "", "", "mean over the samples of the step", "mean_reward"),
    Key("filtered_reward", "the same, of the groups that dynamic sampling keeps", "", "", "mean over these"),
    Key("loss", "what is minimised: the clipped surrogate and the KL times its coefficient", "", "", _TOKENS, "loss"),
    # The KL in the loss, divided by its coefficient again.
    Key("kl_penalty", "KL as it stands in the loss, before its coefficient [nats]", _REF,
        "k3; newer versions clamp the log-ratio at 20 and what is averaged at 10", _TOKENS, "kl",
        "reference_policy_kl_penalty=0 logs 0", also="token_kl"),
    Key("probs_ratio", "ratio to the old policy", _OLD, "", _TOKENS, "mean_ratio"),
    Key("probs_ratio_max", "greatest ratio to the old policy", _OLD, "", "max over the valid tokens", "max_ratio"),
    Key("probs_ratio_min", "least ratio to the old policy", _OLD, "", "min over the valid tokens", "min_ratio"),
    Key("probs_ratio_clamped*", "the ratio after the clip", _OLD, "", "over the valid tokens"),
    Key("approx_entropy", "entropy, from the samples' own log-probs [nats]", "", "weighted by the sampler's ratio",
        _TOKENS, "entropy"),
    Key("grad_norm", "global L2 norm of the gradient before clipping", "", "", "one per step", "grad_norm"),
    Key("lr", "learning rate", "", "", "one per step", "learning_rate"),
    Key("advantages/mean", "advantage", "", "", _TOKENS, "mean_advantage"),
    Key("mean_gen_tokens_per_sample", "generated tokens of a sample", "", "", "mean over samples", "completion_length"),
    Key("max_gen_tokens_per_sample", "most generated tokens", "", "", "max over samples", "max_completion_length"),
    Key("gen_tokens_per_sample/*", "generated tokens of a sample", "", "", "over samples"),
    Key("truncation_rate", "share of samples cut at the limit", "", "", "mean over samples", "truncated_fraction"),
    Key("natural_termination_rate", "share of samples that ended by themselves", "", "", "mean over samples"),
    Key("token_mult_prob_error", "exp of the absolute difference of log-probs to the engine's", _SAMPLER,
        "1 where they agree: no difference in nats", _TOKENS),
    Key("gen_kl_error", "KL to the engine [nats]", _SAMPLER, "k3", _TOKENS),
    Key("policy_kl_error", "KL of the engine to the trainer [nats]", _SAMPLER, "k3", _TOKENS),
    Key("js_divergence_error", "Jensen-Shannon divergence to the engine [nats]", _SAMPLER, "", _TOKENS),
    Key("sampling_importance_ratio", "weight that corrects for the engine", _SAMPLER, "", _TOKENS),
    *(Key(name, "counts, times, settings, evaluations") for name in (
        "global_valid_*", "num_valid_samples", "mean_prompt_length", "total_num_tokens", "turns_per_sample/*", "wd",
        "num_masked_seqs_by_logprob_error", "is_oob_ratio", "performance/*", "timing/*", "validation/*", "vllm/*",
        "baseline_reward/*", "advantages/*", "accuracy", "gpu_monitor/*", "ray/*", "histogram/*", "total_turns*",
        "avg_turns_per_sample", "max_turns_*", "mean_total_tokens_per_sample", "mean_env_tokens_per_sample",
        "consumed_samples", "elapsed_time_s", "total_flops", "num_ranks", "moe_metrics/*", "mtp_metrics/*",
    )),
)  # fmt: skip

NEMO_RL = Family(
    "nemo_rl",
    "NeMo-RL",
    KEYS,
    marks=("token_mult_prob_error", "probs_ratio", "probs_ratio_clamped", "sampling_importance_ratio", "approx_entropy",
           "gen_kl_error", "global_valid_toks", "mean_gen_tokens_per_sample"),
    prefixes=("train/",),
    notes="""\
- Its `kl_penalty` is a k3 per token to the reference, not the signed sum that the canonical kl_penalty is.""",
    last=PLAIN,
)  # fmt: skip
