"""A plain PyTorch loop: the model, the optimizer and the rest are handed over, and `observe` is called a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grpo_watchdog.controls import Check, DialKnob, Knob, dial
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.integrations.torch_checks import ModelChecks
from grpo_watchdog.integrations.torch_finite import FiniteCheck
from grpo_watchdog.integrations.torch_lr import LearningRateCeiling
from grpo_watchdog.integrations.torch_state import TrainingState, part


class TorchControls:
    """What a plain loop offers.

    Args:
        model: the policy, unwrapped (the module whose state_dict is worth keeping).
        optimizer: the one that trains it.
        scheduler: one scheduler, several, or None.
        scaler: a GradScaler, or None.
        reference: the frozen reference policy, or None.
        knobs: kl_coef, clip_epsilon, grad_norm_limit: each a dial or None.
        state: further things with state, by name.
        check_every: optimizer steps between measurements of the weights.

    Raises:
        ConfigurationError: something handed over is not what it should be; says what and what is allowed.
    """

    restorable = True

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,  # noqa: ANN401
        scaler: Any = None,  # noqa: ANN401
        reference: torch.nn.Module | None = None,
        knobs: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        check_every: int = 50,
    ) -> None:
        """Check what was handed over, and hook onto the optimizer."""
        if not isinstance(model, torch.nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise ConfigurationError(f"reference must be a torch.nn.Module, not {type(reference).__name__}")
        if state is not None and not isinstance(state, Mapping):
            raise ConfigurationError(f"state must be a dict of name to object, not {type(state).__name__}")
        schedulers = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
        named = {f"scheduler{i or ''}": s for i, s in enumerate(schedulers) if s is not None}
        extra = dict(state or {})
        if scaler is not None:
            named["scaler"] = scaler
        clash = [name for name in extra if name in {"model", "optimizer", *named} or name.startswith("rng.")]
        if clash:
            raise ConfigurationError(f"state: the name {clash[0]!r} is taken; call it otherwise")
        parts = [part(name, owner) for name, owner in {**named, **extra}.items()]
        turned = {name: dial(spec, name) for name, spec in (knobs or {}).items() if spec is not None}
        finite = FiniteCheck(model, optimizer)
        self._state = TrainingState(model, optimizer, parts, finite)
        self._checks = ModelChecks(model, optimizer, reference, finite, check_every)
        self.knobs: dict[str, Knob] = {}
        self._ceiling = LearningRateCeiling(optimizer) if LearningRateCeiling.fits(optimizer) else None
        if self._ceiling is not None:
            self.knobs["learning_rate"] = self._ceiling
        for name, spec in turned.items():
            self.knobs[name] = DialKnob(spec, "max" if name == "kl_coef" else "min")

    def detach(self) -> None:
        """Take every hook off the optimizer."""
        self._checks.detach()
        if self._ceiling is not None:
            self._ceiling.detach()

    def save(self, folder: Path) -> None:
        """Write the whole training state."""
        self._state.save(folder)

    def restore(self, folder: Path) -> None:
        """Restore everything or nothing."""
        self._state.restore(folder)

    def inspect(self) -> list[Check]:
        """Look at the reference, the trainable set, the weights and the optimizer state."""
        return self._checks.inspect()

    def measure(self) -> dict[str, float]:
        """Return param_change and param_drift."""
        return self._checks.measure()
