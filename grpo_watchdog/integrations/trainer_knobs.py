"""The knobs of a Trainer: the places that it reads on every step, and no others.

`trainer.beta` and `trainer.epsilon_low` / `epsilon_high` are read live; the same names on `trainer.args` are not, after
construction. `args.max_grad_norm` is.
"""

from __future__ import annotations

from typing import Any

from grpo_watchdog.controls import Dial, attr
from grpo_watchdog.integrations.trl_grpo import CLIPPED

_KL = ("GRPOTrainer", "RLOOTrainer")  # whose beta weighs a KL term; DPO's beta, say, is something else


def is_a(trainer: Any, *names: str) -> bool:  # noqa: ANN401
    """Return whether a trainer is of one of these classes or derived from it."""
    return any(kind.__name__ in names for kind in type(trainer).__mro__)


def has_adapters(trainer: Any) -> bool:  # noqa: ANN401
    """Return whether the model is one of PEFT's."""
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def dials(trainer: Any) -> dict[str, Dial | None]:  # noqa: ANN401
    """Return the dials that this trainer has, by the metric that they set; None where there is none."""
    return {
        "kl_coef": _beta(trainer),
        "clip_epsilon": _clip(trainer),
        "grad_norm_limit": attr(trainer.args, "max_grad_norm") if trainer.args.max_grad_norm else None,
    }


def _beta(trainer: Any) -> Dial | None:  # noqa: ANN401
    if not is_a(trainer, *_KL) or not isinstance(getattr(trainer, "beta", None), int | float):
        return None
    if trainer.beta:
        return attr(trainer, "beta")
    if not has_adapters(trainer):
        return None  # there is no reference model to be near to

    def write(value: float) -> None:
        if bool(trainer.beta) != bool(value):
            trainer._buffered_inputs = None  # noqa: SLF001 - drawn without the reference's log-probs
        trainer.beta = value

    return Dial(lambda: float(trainer.beta), write, f"{type(trainer).__name__}.beta")


def _clip(trainer: Any) -> Dial | None:  # noqa: ANN401
    """Return the dial of both half-widths: what is read is the larger one, and they keep their proportion."""
    low, high = (getattr(trainer, f"epsilon_{side}", None) for side in ("low", "high"))
    if not is_a(trainer, *_KL) or not low or not high or getattr(trainer, "loss_type", "grpo") not in CLIPPED:
        return None
    widest = max(low, high)

    def write(value: float) -> None:
        trainer.epsilon_low, trainer.epsilon_high = value * (low / widest), value * (high / widest)

    read = lambda: float(max(trainer.epsilon_low, trainer.epsilon_high))  # noqa: E731
    return Dial(read, write, f"{type(trainer).__name__}.epsilon_low and epsilon_high")
