"""A callback for those who construct their Trainer with callbacks; it attaches when the training begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_watchdog.attach import attach
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watchdog import Watchdog

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = object  # no transformers is imported to be a callback of its: see __getattr__


class WatchdogCallback(TrainerCallback):
    """`Trainer(..., callbacks=[gw.WatchdogCallback(rules="guarded")])`: attaches to that trainer as it begins to train.

    `gw.attach(trainer)` does the same before it begins, and says then what cannot be seen or turned.

    Args:
        rules: the rulebook: a name, a path or a loaded one.
        **options: those of `attach` that a Trainer takes: run_dir, tensorboard, mode, approve, policy fields.

    Attributes:
        dog: the watchdog; None until the training begins.
    """

    def __init__(self, rules: str | Path | Rulebook = "documented", **options: Any) -> None:
        """Remember what to attach with; a ConfigurationError where the run is to be resumed, which is too late then."""
        if options.get("resume"):
            raise ConfigurationError("resume=True: use gw.attach(trainer, resume=True) before trainer.train()")
        self._rules, self._options = rules, options
        self.dog: Watchdog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """Attach to the trainer that calls.

        Raises:
            ConfigurationError: an option cannot be used, or this is not called by a Trainer.
        """
        if self.dog is None:
            self.dog = attach(_caller(args), rules=self._rules, **self._options)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return what does nothing, for the other events."""
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _caller(args: object) -> Any:  # noqa: ANN401
    """Return the trainer up the stack that these arguments are of: a callback is not given it."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if getattr(owner, "callback_handler", None) is not None and getattr(owner, "args", None) is args:
            return owner
        frame = frame.f_back
    raise ConfigurationError("WatchdogCallback was not called by a transformers.Trainer: use gw.attach(trainer)")
