"""attach: one line between a trainer and its watchdog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.metrics import RatioTo
from grpo_watchdog.rulebook import Rulebook, load
from grpo_watchdog.session import earlier_session
from grpo_watchdog.watchdog import Watchdog


def attach(  # noqa: PLR0913 - one keyword for each thing that a loop can hand over
    *,
    model: Any,  # noqa: ANN401 - torch is not imported before it is needed
    optimizer: Any,  # noqa: ANN401
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
    ratio_to: RatioTo = "reference",
    dims: int | None = None,
    tensorboard: Any = False,  # noqa: ANN401
    resume: bool = False,
    mode: str | None = None,
    approve: Callable[..., Any] | None = None,
    **policy: Any,
) -> Watchdog:
    """Attach a watchdog to a plain PyTorch loop.

    Args:
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
        run_dir: where the journal and the checkpoints go.
        ratio_to: the policy that the surrogate ratio is taken to: "reference" (the document's trainer) or "old".
        dims: dimensions or tokens over which a trajectory's log-prob is summed, where known.
        tensorboard: True for `run_dir`/tensorboard, a folder, or a SummaryWriter.
        resume: go on with the run that `run_dir` holds.
        mode: "act", "shadow" (decides and writes down, touches nothing) or "approve" (asks first); None: as the
            rulebook says.
        approve: asked before an order is carried out, where the mode wants that.
        **policy: checkpoint_every, probation, on_divergence, recover_after, rollback_budget, targets, keep ...

    Returns:
        The watchdog. Call `observe(step, metrics)` after each optimizer step.

    Raises:
        ConfigurationError: something handed over cannot be used; says what and what is allowed.
        RulebookError: the rulebook cannot be used; says every problem with its place.
    """
    from grpo_watchdog.integrations.tensorboard import TensorBoardListener  # noqa: PLC0415 - `import grpo_watchdog` stays light
    from grpo_watchdog.integrations.torch_loop import TorchControls  # noqa: PLC0415

    if tensorboard is True:
        if run_dir is None:
            raise ConfigurationError("tensorboard=True writes under run_dir: give run_dir, a folder or a SummaryWriter")
        tensorboard = Path(run_dir) / "tensorboard"
    if mode is not None:
        policy = {**policy, "mode": mode}
    book = (rules if isinstance(rules, Rulebook) else load(rules)).with_policy(policy)
    earlier_session(run_dir, resume=resume)  # refused before anything is hooked
    controls = TorchControls(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        reference=reference,
        knobs={"kl_coef": kl_coef, "clip_epsilon": clip_epsilon, "grad_norm_limit": grad_norm_limit},
        state=state,
        data=data,
        check_every=book.policy.check_every,
        tripwires=book.policy.tripwires,
    )
    listeners = [TensorBoardListener(tensorboard)] if tensorboard else []
    try:
        return Watchdog(
            book, controls, run_dir, ratio_to=ratio_to, dims=dims, resume=resume, listeners=listeners, approve=approve
        )
    except BaseException:
        controls.detach()
        raise
