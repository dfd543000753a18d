"""The hook in a transformers Trainer: when it looks, and what it does with the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_watchdog.errors import DamagedError
from grpo_watchdog.integrations.trainer_controls import TrainerControls
from grpo_watchdog.integrations.trainer_taps import Taps
from grpo_watchdog.integrations.trainer_vault import TrainerVault
from grpo_watchdog.verdict import Verdict
from grpo_watchdog.watchdog import Watchdog

_log = logging.getLogger("grpo_watchdog")


class TrainerHook(TrainerCallback):
    """Observes at the end of each optimizer step, before the trainer logs, evaluates and saves.

    Args:
        trainer: a transformers.Trainer.
        controls: its controls.
        taps: what its steps are seen by.
        vault: its checkpoints.
    """

    def __init__(self, trainer: Any, controls: TrainerControls, taps: Taps, vault: TrainerVault) -> None:  # noqa: ANN401
        """Wrap saving and the beginning of the training; the watchdog is given by `watch`."""
        self._trainer, self._controls, self._taps, self._vault = trainer, controls, taps, vault
        self._dog: Watchdog | None = None
        self._sick_step = -1
        self._total: torch.Tensor | None = None  # the trainer's sum of losses as the step began
        self._rehearse: Callable[[Watchdog], None] | None = None
        taps.surround("_save_checkpoint", self._around_saving)
        taps.surround("train", self._around_training)

    def watch(self, dog: Watchdog, rehearse: Callable[[Watchdog], None] | None = None) -> None:
        """Observe for this watchdog from now on; `rehearse` is called once all is made that the training needs."""
        self._dog, self._rehearse = dog, rehearse
        self._trainer.add_callback(self)

    @property
    def over(self) -> bool:
        """Return whether the run that this hook watched was halted."""
        return self._dog is not None and bool(self._dog.halted)

    def detach(self) -> None:
        """Give the trainer back as it was before the attach."""
        self._trainer.remove_callback(self)
        self._controls.detach()
        self._taps.detach()
        if self._dog is not None:
            self._dog.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """Make sure that the optimizer is still the one that was hooked."""
        now, hooked = self._trainer.optimizer, self._controls.optimizer
        if hooked is not None and getattr(now, "optimizer", now) is not hooked:
            _log.error(
                "the trainer trains with another optimizer than at attach: no learning rate is held, no step vetoed"
            )
        if self._rehearse is not None and self._dog is not None:
            self._rehearse(self._dog)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """Begin an optimizer step."""
        self._taps.begin()
        self._total = self._trainer._tr_loss.clone()  # noqa: SLF001 - no transfer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """Observe the step, and act on the verdict."""
        if self._dog is None:
            return
        self._controls.control = control
        wanted = bool(control.should_save)
        try:
            verdict = self._dog.observe(state.global_step, self._taps.taken())
            checkpoint = f"checkpoint-{state.global_step}"
            if wanted:
                self._vault.users(checkpoint)
            self._obey(verdict, control, checkpoint)
            if any(outcome.action == "veto" and not outcome.held_back for outcome in verdict.actions):
                self._leave_lost_loss_out()
        finally:
            self._controls.control = None

    def _leave_lost_loss_out(self) -> None:
        """Take a vetoed step's loss out of the trainer's running sum, where it is none: NaN would stay to the end."""
        total: torch.Tensor = self._trainer._tr_loss  # noqa: SLF001
        if self._total is not None and not torch.isfinite(total):
            total.copy_(self._total)

    def _obey(self, verdict: Verdict, control: Any, checkpoint: str) -> None:  # noqa: ANN401
        assert self._dog is not None
        in_shadow = self._dog.book.policy.mode == "shadow"
        if not in_shadow and (verdict.rolled_back_to is not None or verdict.level == "critical"):
            control.should_save = False  # a sick step is kept off the disk
            self._sick_step = verdict.step  # whoever asks for it after us: a new best, say
            self._vault.forget(checkpoint)
        if verdict.halt and not control.should_training_stop:
            control.should_training_stop = True
            self._say_how_to_go_on(verdict.step)

    def _say_how_to_go_on(self, step: int) -> None:
        assert self._dog is not None
        try:
            newest = next((checkpoint.id for checkpoint in reversed(self._vault.proven())), None)
        except DamagedError:
            newest = None
        if newest is None:
            _log.error("stopped at step %s: %s. No checkpoint is proven: begin anew", step, self._dog.halted)
            return
        line = f"gw.attach(trainer, run_dir={str(self._dog.run_dir)!r}, resume=True); trainer.train()"
        _log.error(
            "stopped at step %s: %s. To go on from %s, with what is due: %s", step, self._dog.halted,
            self._vault.folder / newest, line,
        )  # fmt: skip

    def _around_saving(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Save as the trainer does; mark the checkpoint; then delete over the user's limit, but not what is needed."""
        arguments, trainer = self._trainer.args, self._trainer
        if trainer.state.global_step == self._sick_step:
            return None
        limit, arguments.save_total_limit = arguments.save_total_limit, None
        try:
            result = call(*args, **kwargs)
        finally:
            arguments.save_total_limit = limit
        try:
            self._arrived(f"checkpoint-{trainer.state.global_step}")
            self._vault.rotate(limit)
        except Exception as error:  # noqa: BLE001 - nothing of ours may break the training
            _log.warning("%s", error)
        return result

    def _arrived(self, checkpoint: str) -> None:
        dog = self._dog
        if dog is None or dog.halted:
            return
        if self._vault.written(checkpoint):  # at once, and then once more: a new best
            self._vault.arrived(checkpoint)
            return
        if not self._vault.asked_for(checkpoint):  # saved on the user's own schedule: as good as any
            if not dog.wants_checkpoints:
                return
            self._controls.adopting = True
            try:
                outcome = dog.checkpoint(self._trainer.state.global_step)
            finally:
                self._controls.adopting = False
            if not outcome.ok:
                return
            self._vault.users(checkpoint)
        self._vault.arrived(checkpoint)

    def _around_training(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Begin from the proven checkpoint of a resumed run, where the user names no other."""
        given = args[0] if args else kwargs.get("resume_from_checkpoint")
        folder, self._controls.resume_from = self._controls.resume_from, None
        if folder is not None and (given is None or given is True):
            args = (str(folder), *args[1:]) if args else args
            kwargs = kwargs if args else {**kwargs, "resume_from_checkpoint": str(folder)}
        elif folder is not None and given is not False and Path(str(given)) != folder:
            _log.warning("resumed from %s as asked for; the newest proven checkpoint is %s", given, folder)
        return call(*args, **kwargs)
