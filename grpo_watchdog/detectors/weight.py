"""Loss weight: the KL coefficient inferred from loss = policy_loss + kl_coef * kl_penalty.

The identity holds exactly in the documented incident. Where the inferred coefficient is steady it is this
run's; where it then changes and nobody announced it (the `kl_coef` metric or knob did not change with it),
something rewrote the loss.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.rule import Number, SingleRule

_FLOAT32_ULP = 2.0**-23
_STEADY = 0.05  # relative scatter up to which the identity is taken to hold


class WeightRule(SingleRule):
    """Holds while the inferred coefficient differs from the run's own by more than a fraction.

    Attributes:
        change: relative change that is worth saying.
        settle: observations from which the run's own value is taken [observations].
    """

    kind: Literal["loss_weight"]
    change: Annotated[Number, Field(gt=0)] = 0.2
    settle: Annotated[int, Field(ge=3, le=1000)] = 8


class WeightDetector:
    """Infers the coefficient, step by step. Not-a-number never enters the baseline."""

    needs: tuple[str, ...] = ("loss", "policy_loss", "kl_penalty")
    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: WeightRule) -> None:
        """Start without a baseline."""
        self._rule = rule
        self._recent: deque[float] = deque(maxlen=rule.settle)
        self._usual: float | None = None
        self._announced: float | None = None

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return the inferred coefficient against the baseline; None while there is no steady one."""
        announced = values.get("kl_coef")
        if announced is not None and math.isfinite(announced) and announced != self._announced:
            self._announced = announced
            self._recent.clear()
            self._usual = None
        loss, policy, kl = values["loss"], values["policy_loss"], values["kl_penalty"]
        noise = _FLOAT32_ULP * (abs(loss) + abs(policy))
        if not math.isfinite(loss - policy) or not abs(kl) > 0 or not math.isfinite(kl):
            return None
        inferred, spread = (loss - policy) / kl, noise / abs(kl)
        if not math.isfinite(inferred) or spread > 0.1 * abs(inferred):
            return None  # the KL term is lost in the rounding of the loss
        if self._usual is None:
            self._settle(inferred)
            return None
        if abs(inferred - self._usual) > self._rule.change * abs(self._usual) + spread:
            note = (
                f"inferred KL coefficient {inferred:.4g}, this run's own was {self._usual:.4g}, and nobody announced it"
            )
            return Reading(1, 1, "loss", inferred, self._usual, note)
        return Reading(0, 0, "loss", inferred, self._usual) if firing else CALM

    def _settle(self, inferred: float) -> None:
        """Take the run's own value once it has been steady; until then the identity cannot be relied on."""
        self._recent.append(inferred)
        if len(self._recent) == self._rule.settle:
            middle = statistics.median(self._recent)
            if max(abs(x - middle) for x in self._recent) <= _STEADY * abs(middle):
                self._usual = middle

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline."""
        return {"recent": list(self._recent), "usual": self._usual, "announced": self._announced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the baseline back."""
        self._recent = deque(state["recent"], maxlen=self._rule.settle)
        self._usual, self._announced = state["usual"], state["announced"]
