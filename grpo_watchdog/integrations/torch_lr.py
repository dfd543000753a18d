"""A learning-rate ceiling that no scheduler can lift and that leaves no trace in the scheduler's state.

The ceiling is applied inside the optimizer's step hooks: lowered just before the step, put back just after.
Between steps every scheduler, logger and checkpoint sees the schedule's own value, so the schedule continues
exactly when the ceiling is lifted.
"""

from __future__ import annotations

from typing import Any

import torch


class LearningRateCeiling:
    """The learning-rate knob of one optimizer; the ceiling of each parameter group is in proportion to its base.

    Args:
        optimizer: any torch optimizer, the inner one where it is wrapped. Tensor-valued rates are clamped in place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks; they do nothing until a ceiling is held."""
        self.where = f"{type(optimizer).__name__}, {len(optimizer.param_groups)} parameter groups"
        self._optimizer = optimizer
        self._bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._ceiling: float | None = None
        self._saved: list[Any] | None = None
        self._steps = 0  # optimizer steps since the ceiling was last set
        self._defied: float | None = None
        self._pending = False  # whether the hold has yet to be read back
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._lower()),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    def read(self) -> float:
        """Return the largest rate that the next step will use."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        if self._ceiling is not None:
            rates = [min(rate, limit) for rate, limit in zip(rates, self._limits(), strict=True)]
        return max(rates)

    def base(self) -> float:
        """Return the largest rate at attach: a scheduler's initial_lr where there is one."""
        return max(self._bases)

    def hold(self, limit: float) -> None:
        """Cap every step from the next one on."""
        self._ceiling, self._steps, self._defied, self._pending = limit, 0, None, True

    def release(self) -> None:
        """Take the cap off."""
        self._ceiling = None
        self._pending = False

    def check(self) -> str | None:
        """Return whether the steps since were capped; an optimizer that never steps, or a hook that rewrites, shows here."""
        if self._ceiling is None:
            return None
        if self._defied is not None:
            said = f"something raised the learning rate to {self._defied:g} inside the optimizer step, over the ceiling of {self._ceiling:g}"
            self._defied = None
            return said
        if self._pending and not self._steps:
            self._pending = False
            return "this optimizer has not stepped since the ceiling was set: is it the one that trains?"
        self._pending = self._pending and not self._steps
        return None

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _limits(self) -> list[float]:
        assert self._ceiling is not None
        largest = self.base()
        shares = [base / largest if largest > 0 else 1.0 for base in self._bases]
        shares += [1.0] * (len(self._optimizer.param_groups) - len(shares))  # groups added later
        return [self._ceiling * share for share in shares]

    def _lower(self) -> None:
        if self._saved is not None:  # the last step raised before it was put back
            self._put_back()
        if self._ceiling is None:
            return
        self._saved = []
        for group, limit in zip(self._optimizer.param_groups, self._limits(), strict=True):
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                self._saved.append((rate.clone(), limit))
                rate.clamp_(max=limit)
            else:
                self._saved.append((rate, limit))
                group["lr"] = min(rate, limit)

    def _put_back(self) -> None:
        if self._saved is None:
            return
        for group, (own, limit) in zip(self._optimizer.param_groups, self._saved, strict=True):
            rate = group["lr"]
            if float(rate) > limit * (1 + 1e-6):
                self._defied = float(rate)
            if isinstance(rate, torch.Tensor):
                rate.copy_(own)
            else:
                group["lr"] = own
        self._saved = None
        self._steps += 1
