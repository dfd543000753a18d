"""Flat: from one batch to the next the rewards have no differences any more, where they had until now.

A task that is being solved gets there step by step, and at its best reward. A reward service that fails hands out one
number from one step to the next, and a sampler that draws one sample for a whole group leaves the groups different.

In a small batch every group may be flat by chance. How often that happened is this run's own rate, and a stretch counts
from the length on at which chance would give it once in a million batches.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.sleep import MOST, Interval
from grpo_watchdog.rule import Number, SingleRule

_ALL = 0.99  # of the groups
_BELOW = math.nextafter(_ALL, 0)
_CHANCE = 1e-6  # of a stretch as long as that
_RATE_WINDOW = 128  # batches that the rate is taken from


class FlatRule(SingleRule):
    """Holds from a batch without differences on, if they were there before, until differences are back.

    Attributes:
        scope: "batch": all rewards are equal; "group": those of each group are, while the groups differ as before.
        equal: spread of a batch up to which its rewards are equal, in the unit of the reward.
        before: the median share of equal groups in the window before must be at most this: until then it was usual.
        sigmas: a reward that rises to its best by no more than this many deviations of the window is a solved task.
        window: batches before that are looked at [observations].
    """

    kind: Literal["flat"]
    scope: Literal["batch", "group"]
    equal: Annotated[Number, Field(ge=0)] = 1e-5
    before: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    sigmas: Annotated[Number, Field(gt=0)] = 3.0
    window: Annotated[int, Field(ge=4, le=1000)] = 8


class FlatDetector:
    """Keeps what the last batches with differences looked like."""

    needs: tuple[str, ...] = ("zero_std_fraction", "std_reward", "mean_reward")
    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: FlatRule) -> None:
        """Start with nothing seen."""
        self._rule = rule
        self._before: deque[tuple[float, float, float]] = deque(maxlen=rule.window)
        self._since: bool | None = None  # whether the flat stretch that goes on began at once; None for none
        self._length = 0  # of that stretch
        self._flats: deque[bool] = deque(maxlen=_RATE_WINDOW)  # which batches before were flat

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether the differences were lost at once; None where a value is not a number."""
        share, spread, reward = values["zero_std_fraction"], values["std_reward"], values["mean_reward"]
        if not math.isfinite(share + spread + reward):
            return None
        if not self._flat(share, spread):
            if self._length and self._length < self._enough():
                self._flats.extend([True] * self._length)
            self._flats.append(False)
            self._since, self._length = None, 0
            self._before.append((share, spread, reward))
            return Reading(0, 0, "zero_std_fraction", share, _ALL) if firing else CALM
        if self._since is None:
            self._since = self._at_once(reward)
        self._length += 1
        if self._since and self._length < self._enough():
            return Reading(0, 0, "zero_std_fraction", share, _ALL) if firing else CALM
        if not self._since:
            self._before.append((share, spread, reward))
            return Reading(0, 0, "zero_std_fraction", share, _ALL) if firing else CALM
        note = f"it was {statistics.median(row[0] for row in self._before):.3g} until then; reward {reward:.4g}"
        return Reading(1, 1, "zero_std_fraction", share, _ALL, note, self._length - 1)

    def columns(self, given: Container[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return all three, in the order in which they are kept."""
        return self.needs

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return where a batch has differences, while those before had them."""
        return None if self._length else ((-MOST, _BELOW), (-MOST, MOST), (-MOST, MOST))

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Keep the batches with differences."""
        share, spread, reward = columns
        self._flats.extend([False] * len(share))
        self._before.extend(zip(share, spread, reward, strict=True))

    def _enough(self) -> float:
        """Return from which length on a stretch is no chance; more than any where the rate is not known yet."""
        rate = (sum(self._flats) + 1) / (len(self._flats) + 2)
        return math.log(_CHANCE) / math.log(rate)

    def _flat(self, share: float, spread: float) -> bool:
        if share < _ALL:
            return False
        if self._rule.scope == "batch":
            return spread <= self._rule.equal
        usual = statistics.median(row[1] for row in self._before) if self._before else math.inf
        return spread > self._rule.equal and spread >= usual / 2

    def _at_once(self, reward: float) -> bool:
        """Return whether the batches before had differences, and this is no task that has just been solved."""
        if len(self._before) < self._rule.window:
            return False
        if statistics.median(row[0] for row in self._before) > self._rule.before:
            return False
        if self._rule.scope == "group":
            return True
        rewards = [row[2] for row in self._before]
        best, middle = max(rewards), statistics.median(rewards)
        noise = 1.4826 * statistics.median(abs(r - middle) for r in rewards)
        return not best <= reward <= best + self._rule.sigmas * noise

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "before": [list(row) for row in self._before],
            "since": self._since,
            "length": self._length,
            "flats": list(self._flats),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._before = deque(((r[0], r[1], r[2]) for r in state["before"]), maxlen=self._rule.window)
        self._since, self._length = state["since"], state["length"]
        self._flats = deque(state["flats"], maxlen=_RATE_WINDOW)
