"""attach, for a plain PyTorch loop that hands its parts over."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog import drill
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.integrations.tensorboard import TensorBoardListener
from grpo_watchdog.integrations.torch_loop import TorchControls
from grpo_watchdog.metrics import RatioTo
from grpo_watchdog.rulebook import Rulebook, load
from grpo_watchdog.session import earlier_session
from grpo_watchdog.watchdog import Watchdog


def attach_loop(
    *,
    rules: str | Path | Rulebook,
    run_dir: str | Path | None,
    tensorboard: Any,  # noqa: ANN401
    resume: bool,
    approve: Callable[..., Any] | None,
    policy: Mapping[str, Any],
    ratio_to: RatioTo | None,
    dims: int | None,
    **parts: Any,
) -> Watchdog:
    """Attach a watchdog to a loop; the arguments are those of `grpo_watchdog.attach`.

    Raises:
        ConfigurationError: something handed over cannot be used; says what and what is allowed.
    """
    if drill.rehearsal is not None:  # nothing of the real run is touched
        run_dir, resume = tempfile.mkdtemp(dir=drill.folder or None), False
    if tensorboard is True:
        if run_dir is None:
            raise ConfigurationError("tensorboard=True writes under run_dir: give run_dir, a folder or a SummaryWriter")
        tensorboard = Path(run_dir) / "tensorboard"
    book = (rules if isinstance(rules, Rulebook) else load(rules)).with_policy(policy)
    earlier_session(run_dir, resume=resume)  # refused before anything is hooked
    knobs = {name: parts.pop(name) for name in ("kl_coef", "clip_epsilon", "grad_norm_limit")}
    controls = TorchControls(knobs=knobs, check_every=book.policy.check_every, tripwires=book.policy.tripwires, **parts)
    listeners = [TensorBoardListener(tensorboard)] if tensorboard else []
    try:
        dog = Watchdog(
            book,
            controls,
            run_dir,
            ratio_to="reference" if ratio_to is None else ratio_to,
            dims=dims,
            resume=resume,
            listeners=listeners,
            approve=approve,
        )
    except BaseException:
        controls.detach()
        raise
    if drill.rehearsal is not None:
        rehearse = drill.rehearsal
        vars(dog)["observe"] = lambda *_, **__: rehearse(dog)
    return dog
