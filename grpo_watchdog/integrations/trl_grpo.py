"""TRL's GRPOTrainer: what its loss, its rewards and its sampler come to on each step.

The pair is current/old for the ratio, current/reference for KL, trainer/sampler for the mismatch. What does not exist
under the trainer's settings (no reference with beta 0, no ratio but 1 where the samples are the policy's own) is not
given at all: absent is not healthy, and a rule that needs it is blind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from grpo_watchdog.integrations.trainer_taps import PEAK, SUM, Taps, Wanted
from grpo_watchdog.integrations.trl_stats import Surrogate, Tally, metrics, reward_stats, token_tally

CLIPPED = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "luspo"})  # losses that clip the ratio to 1 -+ epsilon


class GrpoTaps(Taps):
    """Taps the loss, the log-probs, the rewards and the generation of one trl.GRPOTrainer."""

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401
        """Wrap the methods."""
        super().__init__(trainer)
        self._tally: Tally | None = None
        self._policy: list[torch.Tensor] = []
        self._scored: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._rewards: Wanted = {}
        self._age = 0  # optimizer steps since the samples were drawn
        self._watching = False
        self.surround("_compute_loss", self._around_loss)
        self.wrap("_get_per_token_logps_and_entropies", self._after_scoring)
        self.wrap("_calculate_rewards", self._after_rewards)
        self.wrap("_generate_and_score_completions", self._after_generation)

    def begin(self) -> None:
        """Begin an optimizer step."""
        super().begin()
        self._tally, self._policy, self._rewards = None, [], {}
        self._age += 1

    def wanted(self) -> Wanted:
        """Return the sums, the maxima and the reward metrics, beside what every trainer gives."""
        found = super().wanted()
        found |= self._rewards
        if self._policy:
            found["policy_loss"] = torch.stack(self._policy).sum()
        if self._tally is not None:
            found |= {f"{SUM}{name}": value for name, value in self._tally.sums.items()}
            found |= {f"{PEAK}{name}": value for name, value in self._tally.peaks.items()}
        return found

    def told(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return the canonical metrics; the first update's KL only from the first update after sampling."""
        sums = {name.removeprefix(SUM): numbers.pop(name) for name in list(numbers) if name.startswith(SUM)}
        peaks = {name.removeprefix(PEAK): numbers.pop(name) for name in list(numbers) if name.startswith(PEAK)}
        if sums:
            found = metrics(sums, peaks)
            if self._age != 1:  # at 0 the policy is the one that drew the samples; later, that KL grows with their age
                found.pop("step_kl", None)
            numbers.update(found)
        return super().told(numbers)

    def _around_loss(self, call: Callable[..., Any], model: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        self._scored, self._watching = None, self.trainer.model.training
        try:
            loss = call(model, inputs)
        finally:
            watching, self._watching = self._watching, False
        return self._then(self._after_loss, loss, (inputs,), {}) if watching else loss

    def _after_scoring(self, result: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401
        if self._watching:
            logps, entropies = result[0], result[1]
            self._scored = (logps.detach(), None if entropies is None else entropies.detach())

    def _after_loss(self, _: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        if self._scored is None:
            return
        logps, entropies = self._scored
        tally = token_tally(inputs, logps, entropies, self.surrogate())
        self._tally = tally if self._tally is None else self._tally.plus(tally)
        policy = policy_loss(self.trainer, inputs, logps)
        if policy is not None:
            self._policy.append(policy)
        self._scored = None

    def _after_rewards(self, rewards_NF: torch.Tensor, *_: Any, **__: Any) -> None:
        if self.trainer.model.training:
            weights = self.trainer.reward_weights
            self._rewards = reward_stats(rewards_NF.detach(), weights, self.trainer.num_generations)

    def _after_generation(self, output: Mapping[str, Any], *_: Any, **__: Any) -> None:
        if self.trainer.model.training:
            self._age = 0
            self._rewards["mean_advantage"] = output["advantages"].detach().float().mean()

    def surrogate(self) -> Surrogate:
        """Return how this trainer forms its ratio and clips it, as it stands now."""
        t = self.trainer
        sequence = t.importance_sampling_level == "sequence"
        return Surrogate(sequence, float(t.epsilon_low), float(t.epsilon_high), t.loss_type in CLIPPED)


def policy_loss(trainer: Any, inputs: Mapping[str, Any], logp_BT: torch.Tensor) -> torch.Tensor | None:  # noqa: ANN401
    """Return the policy's part of one micro-batch's loss, normalised as the trainer does: loss less kl_coef times KL.

    Returns:
        None for losses without a clip, and where a further factor or term makes the loss more than these two parts.
    """
    t = trainer
    more = (
        t.off_policy_mask_threshold is not None
        or t.top_entropy_quantile < 1.0
        or (t.use_vllm and t.vllm_importance_sampling_correction)
        or t._entropy_bonus_enabled  # noqa: SLF001
        or t.aux_loss_enabled
    )
    if t.loss_type not in CLIPPED or more:
        return None
    mask_BT = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
    advantages = inputs["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    old_BT = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(logp_BT) if old_BT is None else logp_BT - old_BT
    if t.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - t.epsilon_low, 1 + t.epsilon_high)
    if t.args.delta is not None:
        ratio = ratio.clamp(max=t.args.delta)
    lost: torch.Tensor = -torch.min(ratio * advantages, clipped * advantages) * mask_BT
    window = float(t.current_gradient_accumulation_steps)
    mean: torch.Tensor
    match t.loss_type:
        case "grpo":
            mean = (lost.sum(-1) / mask_BT.sum(-1).clamp(min=1.0)).mean()
        case "bnpo":
            mean = lost.sum() / mask_BT.sum().clamp(min=1.0)
        case "dr_grpo":
            mean = lost.sum() / (len(lost) * float(t.max_completion_length))
        case "luspo":
            mean = lost.sum(-1).mean()
        case _:  # dapo: over the tokens of the generation batch, of which a window is a share
            items: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / t.accelerator.num_processes
            mean = lost.sum() / items * float(t.args.steps_per_generation)
    return mean / window
