"""Loss identity: loss = policy_loss + kl_coef * KL + a rest, and the rest of a run is small or steady.

The identity holds by construction in every GRPO loss; what further terms there are (an entropy bonus) make the rest.
Where that leaves its own level at once, by a good part of the size of the loss's terms, a term entered the loss that
nobody announced: an entropy bonus gone wrong, an auxiliary loss. Where the rest was never steady, nothing can be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.rule import Number, SingleRule

_KL = ("kl", "kl_penalty")  # a loss is built from one of the two
_STEADY = 0.1  # of the size of the terms: up to there the scatter of the rest is small


class IdentityRule(SingleRule):
    """Holds while the rest is away from its level, under every KL under which it was steady.

    Attributes:
        share: how far away, as a share of the usual size of the terms.
        sigmas: and in robust standard deviations of the rest.
        least: and in the unit of the loss: logs round.
        window: how many past values make the level [observations].
        settle: how many there must be before anything can be said [observations].
        accept_after: observations out there after which it is the new level [observations].
    """

    kind: Literal["loss_identity"]
    share: Annotated[Number, Field(gt=0)] = 0.5
    sigmas: Annotated[Number, Field(ge=0)] = 10.0
    least: Annotated[Number, Field(ge=0)] = 1e-3
    window: Annotated[int, Field(ge=5, le=1000)] = 32
    settle: Annotated[int, Field(ge=3, le=1000)] = 8
    accept_after: Annotated[int, Field(ge=1, le=100_000)] = 100


class IdentityDetector:
    """Keeps the level of the rest under each KL that the loss may be built from."""

    needs: tuple[str, ...] = ("loss", "policy_loss", "kl_coef")
    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: IdentityRule) -> None:
        """Start with nothing seen."""
        self._rule = rule
        self._out = 0
        self._begin()

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether the rest left its level; None where it never had one."""
        loss, policy, weight = values["loss"], values["policy_loss"], values["kl_coef"]
        terms = {name: weight * values[name] for name in _KL if name in values}
        if not math.isfinite(loss - policy - sum(terms.values())):
            return None
        known = [name for name in terms if self._known(name)]
        away = [name for name in known if self._away(name, loss - policy - terms[name])]
        if known and len(away) == len(known) and self._out < self._rule.accept_after:
            self._out += 1
            note = f"without policy_loss + kl_coef * KL it is {loss - policy - terms[away[0]]:.4g}, and was "
            return Reading(1, 1, "loss", loss, None, f"{note}{self._rest[away[0]].median():.4g} until now")
        if self._out >= self._rule.accept_after:
            self._begin()  # what stays is the run's own from here on
        self._out = 0
        for name, term in terms.items():
            self._rest[name].add(loss - policy - term)
            self._size[name].add(abs(loss) + abs(policy) + abs(term))
        if not known:
            return None
        return Reading(0, 0, "loss", loss, None) if firing else CALM

    def _begin(self) -> None:
        self._rest = {name: History(self._rule.window) for name in _KL}
        self._size = {name: History(self._rule.window) for name in _KL}
        self._out = 0

    def _known(self, name: str) -> bool:
        rest, size = self._rest[name], self._size[name]
        return len(rest) >= self._rule.settle and rest.deviation() <= max(self._rule.least, _STEADY * size.median())

    def _away(self, name: str, rest: float) -> bool:
        rule, level = self._rule, self._rest[name]
        limit = max(rule.least, rule.sigmas * level.deviation(), rule.share * self._size[name].median())
        return abs(rest - level.median()) > limit

    def state_dict(self) -> dict[str, Any]:
        """Return the levels."""
        return {
            "rest": {name: kept.state_dict() for name, kept in self._rest.items()},
            "size": {name: kept.state_dict() for name, kept in self._size.items()},
            "out": self._out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the levels back."""
        for name in _KL:
            self._rest[name].load_state_dict(state["rest"][name])
            self._size[name].load_state_dict(state["size"][name])
        self._out = state["out"]
