"""What may befall a transformers Trainer while it trains, as callbacks."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments


class LearningRateFault(transformers.TrainerCallback):
    """From a step on, the learning rate is what the schedule says times a factor, whatever is restored.

    It has no memory: the schedule is asked anew on each step, so nothing is multiplied twice, and a rollback of the
    optimizer and the scheduler changes nothing about it.

    Args:
        step: the first that it befalls, counted from 0 [steps].
        factor: what the schedule's value is multiplied by.
    """

    def __init__(self, step: int, factor: float = 100.0) -> None:
        self.step, self.factor = step, factor

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the faulty rate where the optimizer and the log read it."""
        del args, control
        if state.global_step < self.step:
            return
        schedule = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])  # out of accelerate's wrapper
        rates = [
            self.factor * rate * fraction(schedule.last_epoch)
            for rate, fraction in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates  # noqa: SLF001 - what the trainer logs
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class _Once(transformers.TrainerCallback):
    """Something that happens once, at a step; a rollback does not bring it back."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, False

    def due(self, state: TrainerState) -> bool:
        """Return whether it happens now, and remember that it did."""
        now = not self.done and state.global_step >= self.step
        self.done = self.done or now
        return now

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember that."""
        self.done = state["done"]


class GradientFault(_Once):
    """One element of one gradient is NaN, once, after clipping.

    Args:
        step: the step of the optimizer that sees it, counted from 0 [steps].
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set it."""
        del args, control
        if self.due(state):
            # The last layer's: an embedding's might belong to a token that never comes, and nothing would happen.
            gradient = [p.grad for p in kwargs["model"].parameters() if p.grad is not None][-1]
            gradient.view(-1)[0] = math.nan


class WeightFault(_Once):
    """Noise is added to every trainable weight, once, between two steps.

    Args:
        step: the step before which it happens, counted from 0 [steps].
        scale: the noise's standard deviation, in units of the root mean square of the weights it is added to.
    """

    def __init__(self, step: int, scale: float = 3.0) -> None:
        super().__init__(step)
        self.scale = scale

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add it."""
        del args, control
        if not self.due(state):
            return
        noise = torch.Generator().manual_seed(self.step)
        for weight in kwargs["model"].parameters():
            if weight.requires_grad:
                spread = self.scale * weight.square().mean().sqrt()
                weight.add_(spread * torch.randn(weight.shape, generator=noise))
