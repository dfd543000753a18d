"""A learning-rate ceiling that no scheduler can lift and that leaves no trace in the scheduler's state.

The ceiling is applied inside the optimizer's step hooks: lowered just before the step, put back just after.
Between steps every scheduler, logger and checkpoint sees the schedule's own value, so the schedule continues
exactly when the ceiling is lifted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch

_MARK = "_grpo_watchdog_ceiling"
_QUIET = 32  # observations without a step that are no cause for concern: gradient accumulation
_SLACK = 1 + 1e-6  # a float32 rate is rounded


class _Lowered(NamedTuple):
    group: dict[str, Any]
    rate: Any  # the object that the group held: a tensor is changed in place
    own: Any
    wrote: Any
    limit: float


class LearningRateCeiling:
    """The learning-rate knob of one optimizer; the ceiling of each parameter group is in proportion to its base.

    An optimizer has one of these: a second one takes over, and the first says so when it is asked.

    Args:
        optimizer: any torch optimizer, the inner one where it is wrapped. Tensor-valued rates are clamped in place.
    """

    REMEMBERS = ("_ceiling", "_follows", "_anchors", "_asked", "_last", "_trouble", "_quiet", "_usual")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks; they do nothing until a ceiling is held."""
        self.where = f"{type(optimizer).__name__}, {len(optimizer.param_groups)} parameter groups"
        self._optimizer = optimizer
        self._bases = [_base(group) for group in optimizer.param_groups]
        self._largest = max(self._bases)
        self._ceiling: float | None = None
        self._follows = False
        self._anchors: list[float | None] = []  # what each group asked for when the ceiling first cut it
        self._lowered: list[_Lowered] = []
        self._trouble = ""
        self._asked: list[float] = []  # what each group had when the last step began
        self._last: list[float] = []  # and the one before that
        self._quiet = 0  # observations since the last step: `read` is called once an observation or a little more
        self._usual = 0  # the most of them that lay between two steps
        earlier = getattr(optimizer, _MARK, None)
        if earlier is not None:
            earlier.detach()
        setattr(optimizer, _MARK, self)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._quietly(self._lower)),
            optimizer.register_step_post_hook(lambda *_: self._quietly(self._stepped)),
        ]
        if earlier is None:
            _guard(optimizer)

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Return whether every parameter group has a learning rate that is a number: some optimizers find their own."""
        return all(isinstance(g.get("lr"), int | float | torch.Tensor) for g in optimizer.param_groups)

    def read(self) -> float:
        """Return the largest rate that the last step used, or that the next one will, whichever is larger.

        Somebody may write a rate just before each step, and a scheduler put another in its place just after.
        """
        self._quiet += 1
        rates = self._rates()
        if self._ceiling is not None:
            rates = [self._capped(index, rate) for index, rate in enumerate(rates)]
        return max(rates)

    def own(self) -> float:
        """Return the largest rate that the schedule asks for, whatever the ceiling; on the last step or now."""
        return max(self._rates())

    def base(self) -> float:
        """Return the largest rate at attach: what its scheduler starts from or goes up to, where there is one."""
        return self._largest

    def hold(self, limit: float) -> None:
        """Cap every step from the next one on."""
        self._ceiling, self._trouble = limit, ""

    def release(self) -> None:
        """Take the cap off."""
        self._ceiling, self._follows, self._anchors = None, False, []

    def follow(self) -> None:
        """Keep the schedule's shape below the ceiling, in proportion, from where it first exceeds it.

        A schedule that somebody multiplied still decays: held flat, a rate that suited the middle of a run would stay
        to its end. It is let go where the schedule falls to half within one step: the multiplied one is gone.
        """
        self._follows = True

    def check(self) -> str | None:
        """Return why the steps since were not capped: a hook that rewrites, or an optimizer that does not step."""
        if self._ceiling is None:
            return None
        if getattr(self._optimizer, _MARK, None) is not self:
            return "another watchdog was attached to this optimizer since, and took its learning rate over"
        if self._quiet > max(_QUIET, 4 * self._usual):
            self._usual = self._quiet  # said again when it has lasted four times as long
            return f"this optimizer has not stepped for {self._quiet} observations: is it the one that trains?"
        said, self._trouble = self._trouble, ""
        return said or None

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: between steps the rate is the schedule's own anyway."""
        return nullcontext()

    def detach(self) -> None:
        """Take the hooks off."""
        self._put_back()
        for handle in self._handles:
            handle.remove()

    def rewound(self) -> None:
        """Forget what the last step asked for: it was undone."""
        self._asked = []

    def _rates(self) -> list[float]:
        now = [float(group["lr"]) for group in self._optimizer.param_groups]
        return [max(pair) for pair in zip(now, self._asked, strict=True)] if len(now) == len(self._asked) else now

    def _limit(self, index: int) -> float:
        assert self._ceiling is not None
        for group in self._optimizer.param_groups[len(self._bases) :]:  # added since
            self._bases.append(_base(group))
        base = self._bases[index]
        return self._ceiling * min(1.0, base / self._largest) if base > 0 and self._largest > 0 else self._ceiling

    def _capped(self, index: int, rate: float) -> float:
        """Return what a step may use of a rate; the limit in place of NaN."""
        limit = self._limit(index)
        anchor = self._anchors[index] if index < len(self._anchors) else None
        return min(limit, rate) if anchor is None else min(limit * min(1.0, rate / anchor), rate)

    def _anchor(self) -> None:
        """Remember where each group's schedule first exceeded the ceiling; forget it where that is over."""
        count = len(self._asked)
        self._anchors = [*self._anchors, *[None] * (count - len(self._anchors))][:count]
        for index, rate in enumerate(self._asked):
            gone = index < len(self._last) and rate < self._last[index] / 2
            if self._anchors[index] is None or gone:
                self._anchors[index] = rate if rate > self._limit(index) else None
        self._last = self._asked

    def _lower(self) -> None:
        self._put_back()  # nothing is left, unless the last step raised where no guard could be placed
        rates = [group["lr"] for group in self._optimizer.param_groups]
        on_host = not any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates)
        self._asked = [float(rate) for rate in rates] if on_host else []  # no transfer inside a step
        if self._ceiling is None:
            return
        if self._follows:
            self._anchor()
        for index, group in enumerate(self._optimizer.param_groups):
            rate, limit = group["lr"], self._limit(index)
            if isinstance(rate, torch.Tensor):
                own = rate.clone()
                rate.copy_(torch.fmin(rate, torch.full_like(rate, limit)))  # fmin: the same
                self._lowered.append(_Lowered(group, rate, own, rate.clone(), limit))
            else:
                group["lr"] = self._capped(index, rate)
                self._lowered.append(_Lowered(group, rate, rate, group["lr"], limit))

    def _stepped(self) -> None:
        self._usual, self._quiet = max(self._usual, self._quiet), 0
        for group, _, _, _, limit in self._lowered:
            if float(group["lr"]) > limit * _SLACK:
                self._trouble = (
                    f"something raised the learning rate to {float(group['lr']):g} inside the optimizer step, "
                    f"over the ceiling of {limit:g}"
                )
        self._put_back()

    def _put_back(self) -> None:
        """Undo `_lower`, last group first (two may share one tensor); what somebody else wrote since is theirs."""
        while self._lowered:
            group, rate, own, wrote, _ = self._lowered.pop()
            if not isinstance(rate, torch.Tensor):
                if group["lr"] == wrote:
                    group["lr"] = own
            elif torch.equal(rate, wrote):
                rate.copy_(own)

    def _quietly(self, act: Callable[[], None]) -> None:
        """Act inside the optimizer's step, where nothing of ours may raise."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - it is said on the next observation instead
            self._trouble = f"the ceiling could not be applied: {type(error).__name__}: {error}"


def _base(group: dict[str, Any]) -> float:
    """Return the rate that a group's schedule starts from, or the one that it goes up to (one-cycle keeps it there)."""
    return max(float(group.get("initial_lr", group["lr"])), float(group.get("max_lr", 0.0)))


def _guard(optimizer: torch.optim.Optimizer) -> None:
    """Put the rates back where a step raises: no post-hook runs then, and a scheduler may be next to read them."""
    step = optimizer.step
    bound = isinstance(step, MethodType)  # a scheduler that is made later expects a method, and leaves a function
    inner = step.__func__ if isinstance(step, MethodType) else step

    @functools.wraps(inner)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return inner(*args, **kwargs)
        except BaseException:
            ceiling = getattr(optimizer, _MARK)
            ceiling._quietly(ceiling._put_back)  # noqa: SLF001
            raise

    setattr(optimizer, "step", MethodType(guarded, optimizer) if bound else guarded)  # noqa: B010 - for mypy
