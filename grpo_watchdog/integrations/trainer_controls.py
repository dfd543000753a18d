"""What a transformers Trainer offers: its knobs, its optimizer, and its own checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_watchdog.controls import DialKnob, NoControls
from grpo_watchdog.drill import Proof
from grpo_watchdog.errors import CheckpointError, ConfigurationError, RestartError
from grpo_watchdog.integrations.torch_drill import drill
from grpo_watchdog.integrations.torch_loop import TorchControls
from grpo_watchdog.integrations.torch_snapshot import Subject, aside, everything, put_back
from grpo_watchdog.integrations.torch_state import Part, generators
from grpo_watchdog.integrations.trainer_drill import as_it_was, clipped, in_rewards, make_loss, save_elsewhere, written
from grpo_watchdog.integrations.trainer_knobs import dials, is_a
from grpo_watchdog.integrations.trainer_state import TrainerState
from grpo_watchdog.integrations.trainer_taps import Taps

_BY_LOSS = ("kl_coef", "clip_epsilon")


class TrainerControls(TorchControls):
    """The controls of a Trainer whose state can be put back while it trains.

    Args:
        trainer: a transformers.Trainer.
        taps: what its steps are seen by; a gradient norm that a veto asks for travels with their metrics.
        check_every: optimizer steps between measurements of the weights.
        tripwires: watch on every optimizer step that nothing else writes the weights, the moments or the reference.

    Attributes:
        control: the trainer's control object, while a step ends: a checkpoint is asked for through it.
        restart: why this trainer cannot be put back while it runs; "" where it can.
        resume_from: the checkpoint that the next `trainer.train()` goes on from, where the run is resumed.
    """

    def __init__(self, trainer: Any, taps: Taps, *, check_every: int, tripwires: bool) -> None:  # noqa: ANN401
        """Create the optimizer, where the trainer has not done so yet, and hook onto it."""
        self._trainer, self._taps = trainer, taps
        reference = getattr(trainer, "ref_model", None)
        moves = bool(getattr(trainer.args, "sync_ref_model", False))
        self.optimizer = inner_optimizer(trainer)
        super().__init__(
            model=trainer.accelerator.unwrap_model(trainer.model),
            optimizer=self.optimizer,
            reference=None if moves else reference,
            knobs=dials(trainer),
            check_every=check_every,
            tripwires=tripwires,
            read_norm=self._read_norm,
            freezes=False,
        )
        own = {name: knob for name, knob in self.knobs.items() if isinstance(knob, DialKnob)}
        self.state = TrainerState(trainer, own, reference if moves else None)
        self.control: Any = None
        self.restart = why_restart(trainer)
        self.resume_from: Path | None = None
        self.adopting = False

    def save(self, folder: Path) -> None:
        """Have the trainer write a checkpoint: at the end of this step, where one ends, and at once where not.

        Raises:
            CheckpointError: a weight or a moment is not finite, or nothing trains.
        """
        sick = self._finite.weights() or self._finite.moments()
        if sick:
            raise CheckpointError(f"{sick} is not finite: this state is not kept")
        trainer = self._trainer
        if self.adopting:
            return
        if not trainer.is_in_train or trainer.lr_scheduler is None:
            raise CheckpointError("a Trainer writes checkpoints only while it trains")
        step = int(folder.name.rsplit("-", 1)[1])
        if step != trainer.state.global_step:
            raise CheckpointError(f"the trainer is at step {trainer.state.global_step}, not at {step}")
        best = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) == "best"
        if self.control is not None and not best:  # there, a new best decides later whether anything is saved
            self.control.should_save = True
        else:
            trainer._save_checkpoint(trainer.model, None)  # noqa: SLF001 - as the trainer itself does

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Put a checkpoint back in the middle of the training; before it, have the training begin from there.

        Raises:
            RestartError: this trainer cannot be put back while it trains.
            CheckpointError: the checkpoint does not fit; everything is as it was.
        """
        trainer = self._trainer
        if not trainer.is_in_train:
            self.resume_from = folder
            return
        if self.restart:
            raise RestartError(f"not while it trains ({self.restart}): start anew from {folder}")
        try:
            self.state.restore(folder, replay_data=replay_data)
        finally:
            if self._tripwires is not None:
                self._tripwires.rearm()
        self._rewound()
        self._forget_sick_step()

    def drill(self, loss: Callable[[], Any] | None) -> list[Proof]:
        """Prove every dose on this trainer, with a batch and a loss of its own where none is given."""
        numbers = generators()
        before = everything(numbers)
        with self._looking_away(), self._taps.asleep(), aside(self._subject(numbers)):
            try:
                with as_it_was(self._trainer):
                    proofs = self._prove(loss)
            finally:
                put_back(numbers, before)
        return proofs

    def _prove(self, loss: Callable[[], Any] | None) -> list[Proof]:
        trainer, why = self._trainer, ""
        try:
            loss = loss or make_loss(trainer, self.knobs.get("kl_coef"))
        except Exception as error:  # noqa: BLE001 - the user's reward functions, say
            why = f"no batch could be drawn: {type(error).__name__}: {error}"
        more = []
        if "grad_norm_limit" in self.knobs:
            more.append(("grad_norm_limit", lambda: clipped(trainer, self.knobs["grad_norm_limit"])))
        if is_a(trainer, "RLOOTrainer") and "kl_coef" in self.knobs:
            more.append(("kl_coef", lambda: in_rewards(trainer, self.knobs["kl_coef"])))
        proofs = drill(self._subject(self.state.everything()), loss, more)
        return [p._replace(detail=why) if why and p.what in _BY_LOSS and p.result == "unproven" else p for p in proofs]

    def _subject(self, parts: Sequence[Part]) -> Subject:
        """Return what is drilled; a checkpoint is the trainer's own, in another folder."""
        return self._drilled(
            parts,
            lambda folder: save_elsewhere(self._trainer, self.state, folder),
            lambda folder: self.state.restore(written(folder)),
            scheduled=True,
        )

    def _forget_sick_step(self) -> None:
        """Drop what the trainer keeps from the steps that were undone; `state.global_step` goes on.

        Samples that the sick policy drew are drawn again, by the policy that was restored and for the prompts that are
        due: the micro-step counter stays with the data. What goes into the log of this very step stays.
        """
        trainer, control = self._trainer, self.control
        if getattr(trainer, "_buffered_inputs", None) is not None:
            trainer._buffered_inputs = None  # noqa: SLF001
        if hasattr(trainer, "_last_loaded_step"):
            trainer._last_loaded_step = -1  # noqa: SLF001 - vLLM holds the sick weights
        total: torch.Tensor = trainer._tr_loss  # noqa: SLF001
        logs_now = control is not None and control.should_log
        if not logs_now or not torch.isfinite(total):
            total.zero_()  # in place: the training loop holds it too, and NaN less NaN stays NaN
        if not logs_now:
            trainer._globalstep_last_logged = trainer.state.global_step  # noqa: SLF001 - a mean over what follows
            metrics = getattr(trainer, "_metrics", None)
            if isinstance(metrics, dict) and "train" in metrics:
                metrics["train"].clear()

    def _read_norm(self, norm: torch.Tensor) -> float:
        """Bring the norm to the host with the step's metrics; the one from before clipping, where that is larger."""
        told, value = self._taps.fetch(norm)
        assert value is not None
        before = told.get("grad_norm", value)
        return max(before, value) if value == value else value  # noqa: PLR0124 - NaN


class ShardedControls(NoControls):
    """A trainer whose weights lie in pieces (DeepSpeed, FSDP): its settings can be turned, and it can be stopped."""

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401
        """Take the settings."""
        self.optimizer: Any = None
        safe: dict[str, Literal["min", "max"]] = {"kl_coef": "max"}
        given = dials(trainer)
        own = {name: DialKnob(d, safe.get(name, "min")) for name, d in given.items() if d is not None}
        self.knobs = dict(own)
        self.state = TrainerState(trainer, own, None)
        self.control: Any = None
        self.restart = why_restart(trainer)
        self.resume_from: Path | None = None
        self.adopting = False

    def detach(self) -> None:
        """Do nothing: nothing is hooked."""


def is_sharded(trainer: Any) -> bool:  # noqa: ANN401
    """Return whether the optimizer is made, and kept, by something else than the trainer."""
    return bool(getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False))


def inner_optimizer(trainer: Any) -> torch.optim.Optimizer:  # noqa: ANN401
    """Return the torch optimizer that trains, under accelerate's wrapper where there is one; made where it was not."""
    optimizer = trainer.optimizer or trainer.create_optimizer()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"the trainer's optimizer is a {type(optimizer).__name__}, no torch.optim.Optimizer")
    return optimizer


def why_restart(trainer: Any) -> str:  # noqa: ANN401
    """Return why this trainer cannot be put back while it trains, or ""."""
    if trainer.args.save_only_model:
        return "save_only_model=True keeps no optimizer state"
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed keeps the state"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP shards the state"
    if trainer.args.world_size > 1:
        return f"{trainer.args.world_size} processes"
    return ""
