"""attach: one line between a trainer and its watchdog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.metrics import RatioTo
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watchdog import Watchdog

_OF_A_TRAINER = ("add_callback", "callback_handler", "create_optimizer", "train")


def attach(  # noqa: PLR0913 - one keyword for each thing that a loop can hand over
    trainer: Any = None,  # noqa: ANN401 - neither transformers nor torch is imported before it is needed
    /,
    *,
    model: Any = None,  # noqa: ANN401
    optimizer: Any = None,  # noqa: ANN401
    scheduler: Any = None,  # noqa: ANN401
    scaler: Any = None,  # noqa: ANN401
    reference: Any = None,  # noqa: ANN401
    kl_coef: Any = None,  # noqa: ANN401
    clip_epsilon: Any = None,  # noqa: ANN401
    grad_norm_limit: Any = None,  # noqa: ANN401
    state: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    rules: str | Path | Rulebook = "documented",
    run_dir: str | Path | None = None,
    ratio_to: RatioTo | None = None,
    dims: int | None = None,
    tensorboard: Any = False,  # noqa: ANN401
    resume: bool = False,
    mode: str | None = None,
    approve: Callable[..., Any] | None = None,
    **policy: Any,
) -> Watchdog:
    """Attach a watchdog to a transformers Trainer (TRL's among them), or to a plain PyTorch loop.

    `gw.attach(trainer)` is all that a Trainer needs, before `trainer.train()`: what follows up to `rules`, `ratio_to`
    and `dims` are for a loop of one's own, which hands its parts over and calls `observe`.

    Args:
        trainer: a transformers.Trainer or one of TRL's. It is observed at the end of every optimizer step; its own
            `checkpoint-N` folders are what is rolled back to. "documented" and "guarded" are taken in its units.
        model: the policy (torch.nn.Module).
        optimizer: the optimizer that trains it; its learning rate becomes a knob.
        scheduler: its scheduler, or a list of them; saved and restored, never disturbed.
        scaler: its GradScaler.
        reference: the frozen reference policy, looked at by the model checks.
        kl_coef: how the KL coefficient is turned: `gw.attr(config, "beta")`, `gw.item(d, "beta")` or a
            (read, write) pair of functions. Left out, the KL dose cannot be given, and that is said. A checkpoint
            holds what is set there, as it does for the next two; a rollback or a resumed run puts it back.
        clip_epsilon: the same for the clip range.
        grad_norm_limit: the same for the norm that gradients are clipped to.
        state: further things that a rollback must bring back, by name: samplers, data iterators, accumulators.
        data: what decides which data comes next: samplers, data iterators, generators; saved and restored like
            `state` when a run is resumed, but a rollback under a policy with `replay_data: false` leaves it where it
            is, and the global random number generators too.
        rules: the rulebook: a name, a path or a loaded one.
        run_dir: where the journal and the checkpoints go. A Trainer's journal goes to `grpo_watchdog` in its
            output_dir where none is given.
        ratio_to: the policy that the surrogate ratio is taken to: "reference" (the document's trainer, and what None
            is) or "old".
        dims: dimensions or tokens over which a trajectory's log-prob is summed, where known.
        tensorboard: True for `run_dir`/tensorboard, a folder, or a SummaryWriter.
        resume: go on with the run that `run_dir` holds.
        mode: "act", "shadow" (decides and writes down, touches nothing) or "approve" (asks first); None: as the
            rulebook says.
        approve: asked before an order is carried out, where the mode wants that.
        **policy: checkpoint_every, probation, on_divergence, recover_after, rollback_budget, targets, keep ...

    Returns:
        The watchdog. A loop calls `observe(step, metrics)` after each optimizer step; under a Trainer nobody has to.

    Raises:
        ConfigurationError: something handed over cannot be used; says what and what is allowed.
        RulebookError: the rulebook cannot be used; says every problem with its place.
    """
    if mode is not None:
        policy = {**policy, "mode": mode}
    shared = {"rules": rules, "run_dir": run_dir, "tensorboard": tensorboard, "resume": resume, "approve": approve}
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "reference": reference,
        "kl_coef": kl_coef,
        "clip_epsilon": clip_epsilon,
        "grad_norm_limit": grad_norm_limit,
        "state": state,
        "data": data,
        "ratio_to": ratio_to,
        "dims": dims,
    }
    if trainer is None:
        from grpo_watchdog.integrations.torch_attach import attach_loop  # noqa: PLC0415 - `import grpo_watchdog` stays light

        return attach_loop(**parts, **shared, policy=policy)
    _refuse_parts(trainer, parts)
    from grpo_watchdog.integrations.trainer_attach import attach_trainer  # noqa: PLC0415

    return attach_trainer(trainer, **shared, policy=policy)


def _refuse_parts(trainer: object, given: Mapping[str, Any]) -> None:
    """Raise where this is no Trainer, or where parts of a loop are handed over beside one."""
    if not all(hasattr(trainer, name) for name in _OF_A_TRAINER):
        raise ConfigurationError(
            f"{type(trainer).__name__} is no transformers.Trainer; a loop of one's own is attached by its parts: "
            "attach(model=..., optimizer=...)"
        )
    spare = [name for name, part in given.items() if part is not None]
    if spare:
        raise ConfigurationError(f"{spare[0]} is for a loop of one's own: a Trainer has its own, leave it out")
