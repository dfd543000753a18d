"""Taps: what a transformers Trainer computes on a step, taken where it is computed.

Logs are too late and lossy: they average over `logging_steps`, filter NaN, show the last step's gradient norm and the
scheduler's learning rate. So the bound methods of this one trainer are wrapped (no subclass, no other instance is
touched), what they return is looked at, and it is passed on as it is. Everything stays on the device until the one
transfer of the step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from grpo_watchdog.names.trl_keys import FAMILIES, canonical

_log = logging.getLogger("grpo_watchdog")
_NEVER_TOLD = frozenset({"loss", "grad_norm", "learning_rate"})  # these the taps see at their source
SUM, PEAK = "sum.", "peak."  # prefixes of what adds up over processes, and of what has a maximum over them
Wanted = dict[str, torch.Tensor]  # 0-d, by name


class Taps:
    """Wraps the methods that every Trainer has.

    Args:
        trainer: a transformers.Trainer.
    """

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401 - no trainer is imported here
        """Wrap nothing yet but what every trainer has."""
        self.trainer = trainer
        self.transfers = 0  # host transfers made for metrics, in all
        self._wrapped: list[tuple[str, Any]] = []  # with what this trainer itself had there, None for its class's
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._seen: dict[str, int] = {}
        self._off = False
        self._told: dict[str, float] = {}
        self.wrap("training_step", self._after_training_step)
        self.wrap("_get_grad_norm", self._after_grad_norm)

    def wrap(self, name: str, after: Callable[..., None]) -> None:
        """Have `after(result, *args, **kwargs)` called after a method of this trainer; its errors stay inside."""
        self.surround(name, lambda call, *args, **kwargs: self._then(after, call(*args, **kwargs), args, kwargs))

    def surround(self, name: str, around: Callable[..., Any]) -> None:
        """Have `around(method, *args, **kwargs)` called in place of a method of this trainer."""
        inner = getattr(self.trainer, name)
        own = vars(self.trainer).get(name)

        @functools.wraps(inner)
        def tapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return around(inner, *args, **kwargs)

        setattr(self.trainer, name, tapped)
        self._wrapped.append((name, own))

    def detach(self) -> None:
        """Give the trainer its methods back."""
        for name, own in reversed(self._wrapped):
            if own is None:
                vars(self.trainer).pop(name, None)
            else:
                setattr(self.trainer, name, own)
        self._wrapped = []

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """See nothing for the time of the context, and remember what was seen before it."""
        before = dict(vars(self))
        self._off, self._losses, self._norm = True, [], None
        try:
            yield
        finally:
            vars(self).update(before)

    def begin(self) -> None:
        """Begin an optimizer step."""
        self._losses, self._norm, self._told = [], None, {}
        raw = self._raw()
        self._seen = {key: len(values) for key, values in raw.items()}

    def fetch(self, more: torch.Tensor | None = None) -> tuple[dict[str, float], float | None]:
        """Bring everything to the host, in one transfer.

        Args:
            more: a further 0-d tensor that travels with it.

        Returns:
            The step's metrics, and the further value.
        """
        wanted = self.wanted()
        if more is not None:
            wanted["more"] = more
        numbers = self._transfer(wanted)
        extra = numbers.pop("more", None)
        self._told = self.told(numbers)
        return self._told, extra

    def taken(self) -> dict[str, float]:
        """Return the step's metrics; they are fetched now, where they were not before. Never raises."""
        try:
            return self._told or self.fetch()[0]
        except Exception as error:  # noqa: BLE001 - nothing of ours may break the training
            if not self._off:
                self._off = True
                _log.warning("this trainer's metrics cannot be fetched any more: %s: %s", type(error).__name__, error)
            return {}

    @property
    def norm(self) -> Any:  # noqa: ANN401
        """Return the gradient norm of this step before clipping, as the trainer has it: a tensor, a float or None."""
        return self._norm

    def wanted(self) -> Wanted:
        """Return the 0-d tensors of this step."""
        found: Wanted = {}
        if self._losses:
            found["loss"] = functools.reduce(torch.add, self._losses)
        if isinstance(self._norm, torch.Tensor):
            found["grad_norm"] = self._norm.detach().float()
        return found

    def told(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return the canonical metrics of this step from the numbers that were brought, and what the trainer noted."""
        if isinstance(self._norm, int | float):
            numbers["grad_norm"] = float(self._norm)
        for name, value in self.noted().items():
            numbers.setdefault(name, value)
        return numbers

    def noted(self) -> dict[str, float]:
        """Return what the trainer noted for its log on this step alone, by canonical name."""
        fresh: dict[str, float] = {}
        for key, values in self._raw().items():
            new = values[self._seen.get(key, 0) if len(values) >= self._seen.get(key, 0) else 0 :]
            if new:
                fresh[key] = sum(new) / len(new)
        family = next((kind.__name__ for kind in type(self.trainer).__mro__ if kind.__name__ in FAMILIES), "Trainer")
        named = canonical(family, fresh, self.trainer.args)
        return {name: value for name, value in named.items() if name not in _NEVER_TOLD}

    def _raw(self) -> Mapping[str, list[float]]:
        metrics = getattr(self.trainer, "_metrics", None)
        rows = metrics.get("train") if isinstance(metrics, Mapping) else None
        return rows if isinstance(rows, Mapping) else {}

    def _after_training_step(self, loss: torch.Tensor, *_: Any, **__: Any) -> None:
        self._losses.append(loss.detach().float())

    def _after_grad_norm(self, norm: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401
        self._norm = norm

    def _transfer(self, wanted: Wanted) -> dict[str, float]:
        """Bring 0-d tensors to the host together; across processes, sums are added and all others averaged."""
        if not wanted:
            return {}
        home = next(iter(wanted.values())).device
        row = torch.stack([value.to(home, torch.float32) for value in wanted.values()])
        self.transfers += 1
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return dict(zip(wanted, row.tolist(), strict=True))
        rows = accelerator.gather(row.unsqueeze(0)).T.tolist()
        return {name: _together(name, values) for name, values in zip(wanted, rows, strict=True)}

    def _then(self, after: Callable[..., None], result: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if not self._off:
            try:
                with torch.no_grad():
                    after(result, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - nothing of ours may break the training
                self._off = True
                _log.warning("this trainer is not tapped any more: %s: %s", type(error).__name__, error)
        return result


def _together(name: str, values: list[float]) -> float:
    """Return what one number is over all processes: they all decide alike."""
    if any(value != value for value in values):  # noqa: PLR0124 - NaN
        return float("nan")
    if name.startswith(PEAK):
        return max(values)
    return sum(values) if name.startswith(SUM) else sum(values) / len(values)
