"""What a trainer's settings hide: said at attach, and in the report. Absent is not healthy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grpo_watchdog.integrations.trainer_knobs import has_adapters, is_a
from grpo_watchdog.integrations.trl_grpo import CLIPPED

_FEW = 4  # a group of fewer says little about its spread


def blind_spots(trainer: Any) -> list[str]:  # noqa: ANN401
    """Return what cannot be seen or turned under these settings, each with what would switch it on.

    Args:
        trainer: a transformers.Trainer.
    """
    said = list(_any_trainer(trainer))
    if is_a(trainer, "GRPOTrainer"):
        said += [*_kl(trainer), *_ratio(trainer), *_loss(trainer), *_rewards(trainer), *_sampler(trainer)]
    elif not is_a(trainer, "RLOOTrainer"):
        said.append(
            f"{type(trainer).__name__} has no rewards, ratio and KL of GRPO: loss, gradient, learning rate and weights "
            "are watched, with what it notes for its own log"
        )
    return said


def _any_trainer(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    args = trainer.args
    if args.logging_steps > 1 or str(getattr(args.logging_strategy, "value", args.logging_strategy)) != "steps":
        yield (
            "the trainer's own log holds means over several steps, without the NaN among them; the watchdog sees every "
            "step at its source, so the two differ"
        )
    if not args.max_grad_norm:
        yield "max_grad_norm is 0: gradients are not clipped, and there is no limit to tighten; set it to 1.0, say"
    if args.save_total_limit:
        yield (
            f"save_total_limit is {args.save_total_limit}: checkpoints that are proven, or wait for it, are kept "
            "beyond it (keep= says how many)"
        )


def _kl(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    if trainer.beta == 0 and has_adapters(trainer):
        yield (
            "beta is 0: KL to the reference is not computed, so not seen; a KL dose switches it on, with the base "
            "model (adapters off) as the reference"
        )
    elif trainer.beta == 0:
        yield (
            "beta is 0: there is no reference model, so KL is not seen and cannot be dosed; the learning-rate ceiling "
            "and the rollback are given without it; beta=1e-3, say, switches both on"
        )
    elif has_adapters(trainer):
        yield "the reference is the base model with the adapters off: that nothing writes it is not watched"
    if getattr(trainer.args, "sync_ref_model", False):
        yield "sync_ref_model moves the reference on purpose: writes to it are not watched, and checkpoints hold it"


def _ratio(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    args = trainer.args
    aligned = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    if aligned and not trainer.use_vllm:
        yield (
            "each sample is used for one update (num_iterations 1, generation aligned with it): the ratio is 1 by "
            "construction, so log_ratio, mean_ratio, step_kl, ess and clip_fraction are not seen; num_iterations=2 or "
            "steps_per_generation above gradient_accumulation_steps gives them a meaning"
        )
    if trainer.importance_sampling_level == "sequence":
        yield "importance_sampling_level is sequence: log_ratio is the mean over a sequence's tokens, one a sequence"


def _loss(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    if trainer.loss_type not in CLIPPED:
        yield (
            f"loss_type {trainer.loss_type} does not clip the ratio to 1 -+ epsilon: the clip dose cannot be given, "
            "and policy_loss and clip_fraction are not seen"
        )
    elif (
        trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled  # noqa: SLF001
        or trainer.aux_loss_enabled
    ):
        yield "the loss has terms beside the policy's and KL: policy_loss is not seen, nor whether the loss adds up"
    if trainer.args.delta is not None and trainer.loss_type in CLIPPED:
        yield (
            f"delta caps the ratio at {trainer.args.delta:g} in the loss: the ratio's metrics are those before that cap"
        )


def _rewards(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    if trainer.scale_rewards != "group":
        yield (
            f"scale_rewards is {trainer.scale_rewards}: advantages are not of unit scale within a group; "
            "group_std_reward and zero_std_fraction are taken from the rewards themselves, group by group"
        )
    if trainer.num_generations < _FEW:
        pairs = trainer.num_generations == 2 and trainer.scale_rewards == "group"  # noqa: PLR2004 - a pair is two
        fixed = ", and every |advantage| is about 0.71, or 0" if pairs else ""
        yield (
            f"num_generations is {trainer.num_generations}: groups of equal rewards come by chance{fixed}; "
            "group_std_reward and zero_std_fraction say little; 8, say, gives them a meaning"
        )
    if trainer.mask_truncated_completions:
        yield (
            "mask_truncated_completions leaves completions that were cut at the limit out of the loss: log-probs, KL, "
            "ratio and entropy are those of the others, the rewards those of all; truncated_fraction says how many"
        )


def _sampler(trainer: Any) -> Iterator[str]:  # noqa: ANN401
    if trainer.use_vllm:
        if trainer.vllm_importance_sampling_correction:
            yield (
                f"vLLM's importance ratios are capped at {trainer.vllm_importance_sampling_clip_max} in the loss; "
                "sampler_mismatch is the difference of the log-probs themselves, before that"
            )
    elif getattr(trainer, "rollout_func", None) is None:
        yield "samples are drawn by the model that is trained: there is no other sampler, and no sampler_mismatch"
