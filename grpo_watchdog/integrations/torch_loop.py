"""A plain PyTorch loop: the model, the optimizer and the rest are handed over, and `observe` is called a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_watchdog.controls import Check, DialKnob, Knob, Veto, dial
from grpo_watchdog.drill import Proof
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.integrations.torch_checks import ModelChecks
from grpo_watchdog.integrations.torch_drill import drill
from grpo_watchdog.integrations.torch_finite import FiniteCheck
from grpo_watchdog.integrations.torch_lr import LearningRateCeiling
from grpo_watchdog.integrations.torch_snapshot import Subject
from grpo_watchdog.integrations.torch_state import KNOBS, Part, TrainingState, knob_settings, part
from grpo_watchdog.integrations.torch_tripwires import Tripwires
from grpo_watchdog.integrations.torch_veto import GradientVeto


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
        data: what decides which data comes next, by name; a restore may leave it where it is.
        check_every: optimizer steps between measurements of the weights.
        tripwires: watch on every optimizer step that nothing else writes the weights, the moments or the reference.
        read_norm: brings a gradient norm to the host, where an armed veto looks at it.
        freezes: whether a frozen reference is one that requires no gradient: not where it is only run without one.

    Raises:
        ConfigurationError: something handed over is not what it should be; says what and what is allowed.
    """

    restorable = True

    def __init__(  # noqa: PLR0913 - one keyword for each thing that a loop can hand over
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,  # noqa: ANN401
        scaler: Any = None,  # noqa: ANN401
        reference: torch.nn.Module | None = None,
        knobs: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        check_every: int = 50,
        tripwires: bool = False,
        read_norm: Callable[[torch.Tensor], float] = float,
        freezes: bool = True,
    ) -> None:
        """Check what was handed over, and hook onto the optimizer."""
        if not isinstance(model, torch.nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise ConfigurationError(f"reference must be a torch.nn.Module, not {type(reference).__name__}")
        lasting, passing = _parts(scheduler, scaler, state, data)
        turned = {name: dial(spec, name) for name, spec in (knobs or {}).items() if spec is not None}
        self._finite = finite = FiniteCheck(model, optimizer)
        own = {name: DialKnob(spec, "max" if name == "kl_coef" else "min") for name, spec in turned.items()}
        if own:  # after all others: these may be places in one of them
            lasting.append(knob_settings(own))
        self._model, self._optimizer = model, optimizer
        self._state = TrainingState(model, optimizer, lasting, finite, passing)
        self._checks = ModelChecks(model, optimizer, reference, finite, check_every, freezes=freezes)
        self._veto = GradientVeto(optimizer, read_norm)
        self._tripwires = Tripwires(optimizer, reference) if tripwires else None
        self.knobs: dict[str, Knob] = {}
        self._ceiling = LearningRateCeiling(optimizer) if LearningRateCeiling.fits(optimizer) else None
        if self._ceiling is not None:
            self.knobs["learning_rate"] = self._ceiling
        self.knobs |= own

    def detach(self) -> None:
        """Take every hook off the optimizer."""
        self._checks.detach()
        self._veto.detach()
        if self._tripwires is not None:
            self._tripwires.detach()
        if self._ceiling is not None:
            self._ceiling.detach()

    def save(self, folder: Path) -> None:
        """Write the whole training state."""
        self._state.save(folder)

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Restore everything or nothing; without `replay_data` all but the data and the random number generators."""
        try:
            self._state.restore(folder, replay_data=replay_data)
        finally:
            if self._tripwires is not None:
                self._tripwires.rearm()
        self._rewound()

    def _rewound(self) -> None:
        """Take note that the last steps were undone."""
        self._veto.rewound()
        if self._ceiling is not None:
            self._ceiling.rewound()

    def inspect(self) -> list[Check]:
        """Look at the reference, the trainable set, the weights and the optimizer state."""
        return self._checks.inspect()

    def measure(self) -> dict[str, float]:
        """Return param_change and param_drift."""
        return self._checks.measure()

    def signals(self) -> dict[str, float]:
        """Return what the tripwires and the veto saw since the last call."""
        return {**({} if self._tripwires is None else self._tripwires.signals()), **self._veto.signals()}

    def arm(self, veto: Veto | None) -> None:
        """Veto poisoned optimizer steps from now on; None vetoes none."""
        self._veto.arm(veto)

    def vetoed(self) -> list[str]:
        """Return a sentence for each step vetoed since the last call."""
        return self._veto.vetoed()

    def rebase(self) -> None:
        """Take weights, moments and reference as they are now: they were written on purpose."""
        if self._tripwires is not None:
            self._tripwires.rebase()

    def drill(self, loss: Callable[[], Any] | None) -> list[Proof]:
        """Prove every dose on this training."""
        parts = self._state.everything()
        scheduled = any(p.name.startswith("scheduler") for p in parts)
        with self._looking_away():
            return drill(self._drilled(parts, self.save, self.restore, scheduled=scheduled), loss)

    def _drilled(
        self,
        parts: Sequence[Part],
        save: Callable[[Path], object],
        restore: Callable[[Path], object],
        *,
        scheduled: bool,
    ) -> Subject:
        """Return what is drilled, with what looks on."""
        memories: list[tuple[object, tuple[str, ...]]] = [
            (self._veto, GradientVeto.REMEMBERS),
            (self._checks, ModelChecks.REMEMBERS),
        ]
        if self._ceiling is not None:
            memories.append((self._ceiling, LearningRateCeiling.REMEMBERS))
        return Subject(
            self._model, self._optimizer, parts, self.knobs, self._veto, save, restore, memories, scheduled=scheduled
        )

    @contextmanager
    def _looking_away(self) -> Iterator[None]:
        """Have the tripwires see nothing meanwhile."""
        if self._tripwires is None:
            yield
            return
        with self._tripwires.asleep():
            yield

    def pause(self, *, on: bool) -> None:
        """Skip every optimizer step from now on, or none any more."""
        self._veto.pause(on=on)


def _parts(
    scheduler: Any,  # noqa: ANN401
    scaler: Any,  # noqa: ANN401
    state: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
) -> tuple[list[Part], list[Part]]:
    """Return the parts that every restore puts back, and those that one may leave where they are."""
    for what, given in (("state", state), ("data", data)):
        if given is not None and not isinstance(given, Mapping):
            raise ConfigurationError(f"{what} must be a dict of name to object, not {type(given).__name__}")
    schedulers = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
    named = {f"scheduler{i or ''}": s for i, s in enumerate(schedulers) if s is not None}
    if scaler is not None:
        named["scaler"] = scaler
    taken = {"model", "optimizer", KNOBS, *named}
    for what, given in (("state", state), ("data", data)):
        clash = [name for name in given or {} if name in taken or name.startswith("rng.")]
        if clash:
            raise ConfigurationError(f"{what}: the name {clash[0]!r} is taken; call it otherwise")
        taken |= set(given or {})
    lasting = [part(name, owner) for name, owner in {**named, **(state or {})}.items()]
    return lasting, [part(name, owner) for name, owner in (data or {}).items()]
