"""Plain: the common spellings of hand-written loops, and what every log has beside its metrics.

Other families ask this table about keys that theirs lacks. What a loop means by `kl` it does not say: it is taken as a
KL to the reference of an estimator and a reduction that are not stated, and only names that state them say more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from grpo_watchdog.metrics import METRICS
from grpo_watchdog.names.family import Family, Key

_REF, _OLD = "current/reference", "current/old"

# By metric, the more trusted first; words are joined with "_", whatever joins them in the log ("/", ".", "-", a space).
SPELLINGS: dict[str, str] = {
    "loss": (
        "loss total_loss train_loss training_loss loss_total loss_mean mean_loss avg_loss loss_avg grpo_loss "
        "ppo_loss rl_loss"
    ),
    "policy_loss": (
        "policy_loss pg_loss loss_policy policy_gradient_loss loss_pg surrogate_loss loss_actor policy_loss_mean "
        "mean_policy_loss loss_policy_avg pg_loss_mean clip_loss loss_clip actor_loss act_loss actor_loss_mean"
    ),
    "value_loss": (
        "value_loss vf_loss critic_loss v_loss loss_value loss_critic loss_vf value_function_loss loss_value_avg "
        "value_loss_mean cri_loss"
    ),
    "mean_reward": (
        "mean_reward reward reward_mean avg_reward average_reward rewards_mean mean_rewards rewards reward_avg "
        "avg_rewards train_reward train_reward_mean total_reward reward_total reward_total_mean total_reward_mean "
        "raw_reward reward_raw env_reward_mean batch_reward combined_reward reward_combined reward_overall "
        "overall_reward mean_score score score_mean scores_mean scores avg_score average_score reward_score "
        "average_reward_score episode_reward mean_episode_reward episode_reward_mean ep_rew_mean episode_return "
        "mean_return return_mean avg_return"
    ),
    "std_reward": (
        "std_reward reward_std rewards_std std_rewards reward_stdev rewards_stdev score_std scores_std std_score "
        "reward_sigma env_reward_std train_reward_std"
    ),
    "group_std_reward": (
        "group_std_reward group_reward_std reward_std_group within_group_std mean_group_std group_std "
        "group_std_mean reward_group_std group_reward_std_mean reward_std_within"
    ),
    "zero_std_fraction": (
        "zero_std_fraction frac_reward_zero_std frac_zero_std zero_std_frac zero_std_ratio zero_std_rate "
        "zero_variance_fraction frac_zero_variance frac_zero_var zero_var_frac zero_var_fraction zero_variance_frac "
        "zero_variance_ratio zero_variance_rate fraction_zero_std frac_degenerate_groups degenerate_group_fraction "
        "degenerate_frac dead_group_fraction"
    ),
    "kl": (
        "kl kl_div kl_divergence kl_mean mean_kl avg_kl kl_avg kl_ref ref_kl kl_to_ref kl_ref_mean kl_policy_ref "
        "kl_reference reference_kl mean_kl_div kl_div_mean avg_kl_div kl_k3 k3_kl kl_k3_mean kl_per_token "
        "kl_token_mean kl_token token_kl_mean"
    ),
    "token_kl": "token_kl",
    "kl_k1": "kl_k1 k1_kl kl_k1_mean",
    "kl_k2": "kl_k2 k2_kl kl_k2_mean",
    "kl_coef": "kl_coef beta kl_coeff kl_beta kl_weight kl_coefficient beta_kl kl_ctl kl_penalty_coef kl_loss_coef",
    "entropy": (
        "entropy entropy_mean mean_entropy avg_entropy policy_entropy entropy_avg token_entropy mean_token_entropy "
        "token_entropy_mean entropy_per_token policy_entropy_mean"
    ),
    "grad_norm": (
        "grad_norm gradient_norm total_grad_norm grad_norm_total gradnorm global_grad_norm grad_l2_norm "
        "gradient_l2_norm actor_grad_norm policy_grad_norm grad_norm_mean mean_grad_norm grad_norm_preclip "
        "grad_norm_pre_clip grad_norm_before_clip grad_norm_unclipped raw_grad_norm total_norm avg_grad_norm"
    ),
    "learning_rate": "learning_rate lr actor_lr policy_lr lr_actor current_lr actor_learning_rate",
    "clip_fraction": (
        "clip_fraction clip_frac clipfrac clip_ratio fraction_clipped clipped_fraction frac_clipped pg_clipfrac "
        "pg_clip_frac policy_clipfrac clipped_frac clip_frac_mean clipfrac_mean clip_fraction_mean clip_rate "
        "ratio_clipped_fraction policy_clip_fraction ratio_clip_frac"
    ),
    "clip_epsilon": "clip_epsilon clip_eps epsilon_clip clip_range eps_clip",
    "mean_ratio": (
        "mean_ratio ratio_mean ratio avg_ratio ratio_avg importance_ratio mean_importance_ratio "
        "importance_ratio_mean policy_ratio policy_ratio_mean is_ratio_mean prob_ratio_mean"
    ),
    "max_ratio": "max_ratio ratio_max importance_ratio_max max_importance_ratio policy_ratio_max",
    "min_ratio": "min_ratio ratio_min importance_ratio_min min_importance_ratio policy_ratio_min",
    "log_ratio": "log_ratio log_ratio_mean mean_log_ratio logratio_mean logratio mean_logratio",
    "max_abs_log_ratio": "max_abs_log_ratio log_ratio_abs_max log_ratio_max_abs abs_log_ratio_max max_abs_logratio",
    "ess": "ess ess_fraction ess_ratio ess_frac effective_sample_size_fraction",
    "mean_advantage": (
        "mean_advantage advantage_mean advantages_mean adv_mean mean_adv mean_advantages advantages advantage "
        "avg_advantage"
    ),
    "std_advantage": "std_advantage advantage_std advantages_std adv_std std_adv std_advantages",
    "mean_abs_advantage": (
        "mean_abs_advantage abs_advantage_mean advantage_abs_mean adv_abs_mean mean_abs_adv abs_adv_mean"
    ),
    "completion_length": (
        "completion_length response_length mean_completion_length mean_response_length avg_completion_length "
        "avg_response_length completion_length_mean response_length_mean completions_mean_length mean_length "
        "length_mean avg_length avg_len mean_len response_len completion_len avg_response_len mean_response_len "
        "avg_completion_len mean_completion_len response_len_mean completion_len_mean gen_len gen_length "
        "mean_gen_len avg_gen_len generated_length output_length mean_output_length avg_output_length "
        "output_len_mean completion_tokens_mean mean_completion_tokens avg_completion_tokens mean_response_tokens "
        "avg_response_tokens avg_resp_len avg_resp_length mean_gen_length"
    ),
    "min_completion_length": (
        "min_completion_length completion_length_min response_length_min min_response_length completions_min_length "
        "min_length length_min response_len_min completion_len_min"
    ),
    "max_completion_length": (
        "max_completion_length completion_length_max response_length_max max_response_length completions_max_length "
        "max_length length_max response_len_max completion_len_max"
    ),
    "truncated_fraction": (
        "truncated_fraction truncation_rate truncated_ratio truncation_ratio frac_truncated truncated_frac "
        "truncated_rate clipped_ratio completions_clipped_ratio response_length_clip_ratio truncation_frac "
        "fraction_truncated truncation_fraction trunc_rate trunc_frac"
    ),
    "sampler_mismatch": "sampler_mismatch",
}
_SELDOM = frozenset({  # the watchdog's own: elsewhere their names say something else, or nothing for sure
    "param_change", "param_drift", "weights_touched", "moments_touched", "reference_touched", "vetoes",
    "learning_rate_set", "kl_coef_set", "clip_epsilon_set",
})  # fmt: skip
_MEANS = {
    "kl": "a KL to the reference, whose estimator and reduction the loop does not say",
    "clip_fraction": "share of ratios that were clipped, or at which the clip acts",
}
_UNCERTAIN = {
    # Of the old policy's samples, and of no estimator that is agreed on: k1 here, half a square there.
    "a KL to the old policy, whose estimator the loop does not say": (
        "approx_kl approxkl approx_kl_mean mean_approx_kl old_kl kl_old kl_to_old ppo_kl policykl approx_kl_old"
    ),
    "KL as it stands in the loss: whether with its coefficient the loop does not say": (
        "kl_loss loss_kl kl_term kl_cost"
    ),
    "entropy as it stands in the loss: of a sign that the loop does not say": (
        "entropy_loss loss_entropy entropy_bonus entropy_term ent_loss"
    ),
    "gradient norm after clipping": (
        "clipped_grad_norm grad_norm_clipped grad_norm_after_clip grad_norm_postclip grad_norm_post_clip"
    ),
    "of the critic": (
        "critic_lr critic_grad_norm value_lr value_grad_norm explained_variance explained_var vf_explained_var"
    ),
}
_WHOSE = "global_|train_|training_|optimizer_|rollout_|total_|num_|n_"
_KNOWN = [  # regular expressions, in the words of `words`, of what is no metric that is watched
    "(eval|evaluation|val|valid|validation|test|heldout|holdout|held_out|dev)(_.*)?|.*_eval|(val|eval|test)[a-z]*_.*",
    "(time|timing|timings|timer|perf|performance|throughput|memory|mem|gpu|cpu|system|sys|hardware)(_.*)?",
    ".*_(time|times|s|seconds|secs|sec|ms|minutes|hours|runtime|elapsed|throughput|gb|mb|bytes|tflops|mfu|flops)",
    ".*(per_second|per_sec|_memory_|tokens_per|samples_per|steps_per)(_.*)?",
    "(elapsed|runtime|wall|wallclock|eta|fps|sps|date|datetime|timestamp)(_.*)?",
    f"({_WHOSE})?(step|update|iteration|iter|epoch|episode|(mini)?batch|timestep)(s|es)?(_idx)?",
    f"({_WHOSE})?(sample|token|group|prompt|rollout|generation)s?(_seen)?",
    "index|idx|seed|rank|n|batch_size|group_size|total_flos|progress|param_count|params_with_grad|temperature",
    "weight_decay|unnamed_0|ppo_epoch|inner_epoch",
]  # fmt: skip
_KNOWN_AT_ONCE = re.compile("|".join(f"(?:{pattern})" for pattern in _KNOWN))
_SPLIT = re.compile(r"[\s/.\-:]+")
_BEGINNINGS = (
    "train", "training", "rollout", "metrics", "grpo", "ppo", "rl", "stats", "log", "logs", "optimizer", "optim",
    "training_dynamics", "gradients", "actor", "policy", "losses", "loss", "objective", "env", "charts", "global",
    "info",
)  # fmt: skip
_SILENT = Key("*", "a count, a time, a size, a setting, or of an evaluation: nothing that is watched")


def words(key: str) -> str:
    """Return a key in the words of the table: lower case, joined with "_"."""
    return _SPLIT.sub("_", key.strip()).strip("_").lower()


def _lines() -> Iterator[Key]:
    for name, spellings in SPELLINGS.items():
        metric = METRICS[name]
        also = "kl" if name == "token_kl" else ""
        means = _MEANS.get(name) or metric.formula
        yield from (Key(word, means, metric.pair, "", "", name, also=also) for word in spellings.split())
    for name, metric in METRICS.items():
        if name not in SPELLINGS and name not in _SELDOM:
            yield Key(name, metric.formula, metric.pair, "", metric.reduction, name)
    for means, spellings in _UNCERTAIN.items():
        pair = _OLD if "old policy" in means else _REF if "KL" in means else ""
        yield from (Key(word, means, pair) for word in spellings.split())


class Worded(Family):
    """Spells every key alike before it looks it up: its table is in words, as `words` makes them."""

    def spelt(self, key: str) -> str:
        """Return a key in the words of the table."""
        return words(super().spelt(key))


class _Plain(Worded):
    """Passes over one beginning, and knows what is no metric."""

    def _own(self, key: str) -> list[tuple[int, Key]]:
        name = words(key)
        lines = self._exact.get(name)
        if lines:
            return lines
        silent = [(len(self.keys), _SILENT)]
        if _KNOWN_AT_ONCE.fullmatch(name):
            return silent
        for begins in _BEGINNINGS:
            rest = name.removeprefix(f"{begins}_")
            if rest != name and rest in self._exact:
                return self._exact[rest]
        return silent if _KNOWN_AT_ONCE.fullmatch(name.partition("_")[2]) else []


PLAIN = _Plain("plain", "A loop of one's own", _lines(), notes="""\
- Case, and what joins the words of a key, make no difference; of beginnings such as `train/` one is passed over.
- Nothing is guessed from a part of a name: what is not spelt as in the table is unknown, and listed.""")  # fmt: skip
