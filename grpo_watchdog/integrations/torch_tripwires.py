"""Tripwires: what is exactly 0 in a healthy training, watched on every optimizer step.

Only the optimizer's own step writes the weights that it trains and the moments that it keeps, and nothing writes the
reference. Evenly spaced elements of each tensor (up to SAMPLE; all, where there are no more) are kept after every step
and compared before the next one. A write that misses them all is not seen.

What writes weights between the steps on purpose (a projection, a second optimizer on the same weights, an optimizer
with train and eval modes) trips these: such a run does without them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from grpo_watchdog.integrations.torch_spaced import Lane, Named, wide

_log = logging.getLogger("grpo_watchdog")


class _Kept(NamedTuple):
    """What an optimizer keeps for one parameter, as it was found."""

    state: dict[str, Any]
    size: int
    moments: list[tuple[str, torch.Tensor, int]]  # with its address: `tensor.data = other` leaves the object


class Tripwires:
    """Watches the weights and moments of one optimizer, and a reference.

    Args:
        optimizer: its parameters are the weights that are watched, from the first step on.
        reference: the frozen reference policy, watched from now on, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reference: torch.nn.Module | None) -> None:
        """Keep the reference's elements, and hook onto the optimizer."""
        self._optimizer, self._reference = optimizer, reference
        self._weights: list[tuple[torch.Tensor, int]] = []
        self._moments: list[_Kept] = []
        self._frozen: list[tuple[torch.Tensor, int]] = []
        self._lanes = {
            "weights_touched": Lane(self._find_weights, self._same_weights),
            "moments_touched": Lane(self._find_moments, self._same_moments),
        }
        self._standing = Lane(self._find_reference, self._same_reference)
        self._inside = self._off = False  # inside: a step has begun; still so after one that raised
        self._worst: dict[str, torch.Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._quietly(self._before_step)),
            optimizer.register_step_post_hook(lambda *_: self._quietly(self._after_step)),
        ]
        self._quietly(self._standing.keep)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """See nothing for the time of the context; what is there after it must be what was there before."""
        off, self._off = self._off, True
        try:
            yield
        finally:
            self._off = off

    def rearm(self) -> None:
        """Take the weights and moments of now as right: our own restore wrote them. The reference stays what it was."""
        for name, lane in self._lanes.items():
            self._worst.pop(name, None)
            if lane.kept:
                self._quietly(lane.keep)
        self._inside = False

    def rebase(self) -> None:
        """Take the reference of now as right too: somebody wrote it on purpose."""
        self.rearm()
        self._worst.pop("reference_touched", None)
        if self._reference is not None:
            self._quietly(self._standing.keep)

    def signals(self) -> dict[str, float]:
        """Compare now, and return the worst since the last call, in one transfer; no param_change without a step."""
        if not self._inside:
            self._quietly(self._compare)
        if self._reference is not None:  # what it was at attach is kept for good: once an observation is enough
            self._quietly(lambda: self._note("reference_touched", self._standing.touched()))
        if self._off:
            return {}
        found = dict.fromkeys(self._lanes, 0.0)
        if self._reference is not None:
            found["reference_touched"] = 0.0
        worst, self._worst = self._worst, {}
        if worst:
            home = next(iter(worst.values()))
            values = torch.stack([value.to(home.device, wide(home)) for value in worst.values()]).tolist()
            found |= {n: v if math.isfinite(v) else math.inf for n, v in zip(worst, values, strict=True)}
            if any(found[name] for name in self._lanes):  # or the same write would be told again at the next step
                for lane in self._lanes.values():
                    self._quietly(lane.keep)
        return found

    def _before_step(self) -> None:
        if self._inside:  # the last step raised halfway
            for lane in self._lanes.values():
                lane.kept = False
        self._compare()
        self._inside = True

    def _after_step(self) -> None:
        self._inside = False
        weights, moments = self._lanes.values()
        if weights.keep():
            self._note("param_change", weights.step())
        moments.keep()

    def _compare(self) -> None:
        for name, lane in self._lanes.items():
            self._note(name, lane.touched())

    def _note(self, name: str, value: torch.Tensor | None) -> None:
        if value is not None:
            worst = self._worst.get(name)
            self._worst[name] = value if worst is None else torch.maximum(worst, value.to(worst))

    def _find_weights(self) -> Named:
        self._weights = [(p, p.data_ptr()) for p in self._trained()]
        return [("weights", p) for p, _ in self._weights]

    def _same_weights(self) -> bool:
        return _same(self._trained(), self._weights)

    def _trained(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _find_reference(self) -> Named:
        self._frozen = [(p, p.data_ptr()) for p in self._standing_weights()]
        return [("reference", p) for p, _ in self._frozen]

    def _same_reference(self) -> bool:
        return _same(self._standing_weights(), self._frozen)

    def _standing_weights(self) -> list[torch.Tensor]:
        return [] if self._reference is None else list(self._reference.parameters())

    def _find_moments(self) -> Named:
        self._moments = [
            _Kept(state, len(state), [(k, t, t.data_ptr()) for k, t in state.items() if _is_moment(t)])
            for state in self._optimizer.state.values()
        ]
        return [(kind, tensor) for kept in self._moments for kind, tensor, _ in kept.moments]

    def _same_moments(self) -> bool:
        states = self._optimizer.state
        return len(states) == len(self._moments) and all(
            state is kept.state
            and len(state) == kept.size
            and all(state.get(kind) is t and t.data_ptr() == place for kind, t, place in kept.moments)
            for state, kept in zip(states.values(), self._moments, strict=True)
        )

    def _quietly(self, act: Callable[[], object]) -> None:
        """Act inside the optimizer's step, where nothing of ours may raise."""
        if self._off:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - weights of a kind that cannot be gathered
            self._off = True
            _log.warning("the tripwires are off: %s: %s", type(error).__name__, error)


def _is_moment(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 1 and value.is_floating_point()


def _same(now: list[torch.Tensor], then: list[tuple[torch.Tensor, int]]) -> bool:
    return len(now) == len(then) and all(
        a is b and a.data_ptr() == place for a, (b, place) in zip(now, then, strict=True)
    )
