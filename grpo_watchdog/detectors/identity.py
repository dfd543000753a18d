"""Loss identity: loss = policy_loss + kl_coef * KL + a rest, and the rest of a run is small or steady.

The identity holds by construction in every GRPO loss; what further terms there are (an entropy bonus) make the rest.
Where that leaves its own level at once, by a good part of the size of the loss's terms, a term entered the loss that
nobody announced: an entropy bonus gone wrong, an auxiliary loss. Where the rest was never steady, nothing can be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import MOST, NAP
from grpo_watchdog.rule import Number, SingleRule

_KL = ("kl", "kl_penalty")  # a loss is built from one of the two
_SAFE = 1e-9  # relative: far beyond what rounding may do to a difference
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


class _Nap(NamedTuple):
    """What the next observations are under one KL, where they can be told from their rest alone.

    Attributes:
        name: the KL.
        other: the KL that is not given.
        low: from which rest on.
        high: up to which.
        reading: CALM, or None where it has no level.
        most: for so many observations.
    """

    name: str
    other: str
    low: float
    high: float
    reading: Reading | None
    most: int


class IdentityDetector:
    """Keeps the level of the rest under each KL that the loss may be built from."""

    needs: tuple[str, ...] = ("loss", "policy_loss", "kl_coef")
    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: IdentityRule) -> None:
        """Start with nothing seen."""
        self._window, self._settle, self._accept_after = (
            rule.window,
            rule.settle,
            rule.accept_after,
        )  # a look at a pydantic model costs several at a plain attribute
        self._least, self._sigmas, self._share = rule.least, rule.sigmas, rule.share
        self._out = 0
        self._nap: _Nap | None = None
        self._begin()

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether the rest left its level; None where it never had one."""
        loss, policy, weight = values["loss"], values["policy_loss"], values["kl_coef"]
        nap = self._nap
        if nap is not None and not firing:
            term = weight * values.get(nap.name, math.nan)
            rest, size = loss - policy - term, abs(loss) + abs(policy) + abs(term)
            if nap.low <= rest <= nap.high and size <= MOST and nap.other not in values:
                self._later.append((rest, size))
                if len(self._later) >= nap.most:
                    self._wake()
                return nap.reading
        self._wake()
        terms = {name: weight * values[name] for name in _KL if name in values}
        if not math.isfinite(loss - policy - sum(terms.values())):
            return None
        known = [name for name in terms if self._known(name)]
        away = [name for name in known if self._away(name, loss - policy - terms[name])]
        if known and len(away) == len(known) and self._out < self._accept_after:
            self._out += 1
            note = f"without policy_loss + kl_coef * KL it is {loss - policy - terms[away[0]]:.4g}, and was "
            return Reading(1, 1, "loss", loss, None, f"{note}{self._rest[away[0]].median():.4g} until now")
        if self._out >= self._accept_after:
            self._begin()  # what stays is the run's own from here on
        self._out = 0
        for name, term in terms.items():
            self._rest[name].add(loss - policy - term)
            self._size[name].add(abs(loss) + abs(policy) + abs(term))
        if len(terms) == 1:
            (name,) = terms
            self._nap = self._lie_down(name)
        if not known:
            return None
        return Reading(0, 0, "loss", loss, None) if firing else CALM

    def _begin(self) -> None:
        self._rest = {name: History(self._window) for name in _KL}
        self._size = {name: History(self._window) for name in _KL}
        self._out = 0
        self._nap = None
        self._later: list[tuple[float, float]] = []  # rest and size that are still to be learned

    def _lie_down(self, name: str) -> _Nap | None:
        """Return what can be told of the next observations, until the deviation is taken anew."""
        level = self._rest[name]
        most = min(NAP, level.fresh)
        other = _KL[1 - _KL.index(name)]
        rests, sizes = level.between(NAP), self._size[name].between(NAP)
        if rests is None or sizes is None or most < 1 or len(level) < self._settle:
            return None
        deviation = level.deviation()
        if deviation > max(self._least, _STEADY * sizes[1]):
            return _Nap(name, other, -MOST, MOST, None, most)
        if deviation > max(self._least, _STEADY * sizes[0]):
            return None
        far = max(self._least, self._sigmas * deviation, self._share * sizes[0])
        far -= _SAFE * (far + abs(rests[0]) + abs(rests[1]))
        return _Nap(name, other, rests[1] - far, rests[0] + far, CALM, most)

    def _wake(self) -> None:
        """Learn what was put off."""
        if self._nap is not None and self._later:
            self._rest[self._nap.name].extend([rest for rest, _ in self._later])
            self._size[self._nap.name].extend([size for _, size in self._later])
            self._later = []
        self._nap = None

    def _known(self, name: str) -> bool:
        rest, size = self._rest[name], self._size[name]
        return len(rest) >= self._settle and rest.deviation() <= max(self._least, _STEADY * size.median())

    def _away(self, name: str, rest: float) -> bool:
        level = self._rest[name]
        limit = max(self._least, self._sigmas * level.deviation(), self._share * self._size[name].median())
        return abs(rest - level.median()) > limit

    def state_dict(self) -> dict[str, Any]:
        """Return the levels."""
        self._wake()
        return {
            "rest": {name: kept.state_dict() for name, kept in self._rest.items()},
            "size": {name: kept.state_dict() for name, kept in self._size.items()},
            "out": self._out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the levels back."""
        self._begin()
        for name in _KL:
            self._rest[name].load_state_dict(state["rest"][name])
            self._size[name].load_state_dict(state["size"][name])
        self._out = state["out"]
