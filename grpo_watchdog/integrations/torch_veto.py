"""The veto: an optimizer step whose gradient is not finite, or absurd beside the run's own, changes nothing.

The gradients are taken away just before the step and given back just after. A parameter without a gradient is passed
over by every torch optimizer: its value, its moments and its step counter stay what they were, to the last bit.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from grpo_watchdog.controls import Veto

WINDOW = 64  # accepted norms that the baseline is taken from [steps]
_FEWEST = 10  # accepted norms before anything finite can be absurd [steps]
_ROOM = 2.0  # an absurd norm also exceeds this many times the largest that passed: a run may have two scales
_TOLD = 16  # sentences kept between two readings
_log = logging.getLogger("grpo_watchdog")


class _Judged(NamedTuple):
    refused: bool
    reason: str


class Baseline:
    """The gradient norms that the run was seen to have, and the judgement of the next one. Pure memory.

    A norm is absurd where it exceeds `factor` times the median of the last WINDOW accepted norms and twice the
    largest that ever passed: where a task is solved gradients are next to 0, and a rare miss is as large as ever.
    Norms of exactly 0 (a batch without any advantage) and norms that were refused never enter.
    After `most` refusals within the last WINDOW steps absurd norms are let through, and enter.
    """

    def __init__(self) -> None:
        """Start without any norm."""
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._refused: deque[int] = deque()  # the steps at which an absurd norm was refused, the recent ones
        self._most = 0.0  # the largest that passed and was not absurd
        self._let = 0.0  # the largest that passed although it was
        self._steps = 0

    def judge(self, norm: float, veto: Veto) -> _Judged:
        """Return whether the step with this gradient norm is refused, and why; remember the norm."""
        self._steps += 1
        if not math.isfinite(norm):
            return _Judged(refused=True, reason=f"gradient norm {norm:g}")
        if norm == 0:
            return _Judged(refused=False, reason="")
        reason = self._absurd(norm, veto.factor)
        while self._refused and self._refused[0] <= self._steps - WINDOW:
            self._refused.popleft()
        if reason and len(self._refused) < veto.most:
            self._refused.append(self._steps)
            return _Judged(refused=True, reason=reason)
        self._norms.append(norm)
        if norm > _ROOM * self._most and len(self._norms) > _FEWEST:
            self._let = max(self._let, norm)  # it passed all the same: the run may have two scales
        else:
            self._most = max(self._most, norm)
        return _Judged(refused=False, reason="")

    def rewound(self, factor: float) -> None:
        """Forget what was let through: the run was rolled back to before it."""
        self._refused.clear()
        self._let = 0.0
        if self._norms:
            limit = factor * statistics.median(self._norms)
            self._norms = deque((n for n in self._norms if n <= limit), WINDOW)

    def _absurd(self, norm: float, factor: float) -> str:
        if len(self._norms) < _FEWEST or norm <= _ROOM * max(self._most, self._let):
            return ""
        usual = statistics.median(self._norms)
        if norm <= factor * usual:
            return ""
        times, seen = f"{norm / usual:,.0f} times", len(self._norms)
        return f"gradient norm {norm:.2g}, {times} the median {usual:.2g} of the last {seen} steps"


class GradientVeto:
    """Vetoes poisoned steps of one optimizer while it is armed; one norm over all gradients a step, one transfer.

    Not vetoed: a step that is handed a closure (LBFGS: it computes its gradients inside), a step captured in a CUDA
    graph, and one that a GradScaler skips by itself. Each process judges the gradients that it holds: the same ones
    in every process under DDP, but not where gradients are sharded.

    Args:
        optimizer: the one whose steps are vetoed.
        read: brings the norm of the gradients to the host. A trainer that has more to bring on a step lets it travel
            along, and may return a larger norm: that from before clipping.
    """

    REMEMBERS = ("_baseline", "_told", "_untold", "_count")

    def __init__(self, optimizer: torch.optim.Optimizer, read: Callable[[torch.Tensor], float] = float) -> None:
        """Hook nothing yet."""
        self._optimizer, self._read = optimizer, read
        self._veto: Veto | None = None
        self._paused = False
        self._handles: list[Any] = []
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._baseline = Baseline()
        self._told: list[str] = []
        self._untold = self._count = 0

    @property
    def armed(self) -> Veto | None:
        """Return what is vetoed."""
        return self._veto

    @property
    def paused(self) -> bool:
        """Return whether every step is skipped."""
        return self._paused

    def arm(self, veto: Veto | None) -> None:
        """Veto from the next step on, or not any more."""
        self._veto = veto
        self._hook()

    def pause(self, *, on: bool) -> None:
        """Skip every step from the next one on, whatever its gradient, or none any more."""
        self._paused = on
        self._hook()

    def _hook(self) -> None:
        if self._veto is None and not self._paused:
            self.detach()
        elif not self._handles:
            self._handles = [
                self._optimizer.register_step_pre_hook(lambda _, args, named: self._quietly(self._judge, args, named)),
                self._optimizer.register_step_post_hook(lambda *_: self._quietly(self._give_back)),
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rewound(self) -> None:
        """Take note of a rollback."""
        if self._veto is not None:
            self._baseline.rewound(self._veto.factor)

    def afresh(self) -> None:
        """Know of no step so far."""
        self._baseline = Baseline()

    def signals(self) -> dict[str, float]:
        """Return the steps vetoed since the last call; {} while it is not armed."""
        count, self._count = self._count, 0
        return {"vetoes": float(count)} if self._veto is not None or count else {}

    def vetoed(self) -> list[str]:
        """Return a sentence for each step vetoed since the last call, at most _TOLD and one for the rest."""
        told, more = self._told, self._untold
        self._told, self._untold = [], 0
        return [*told, f"and {more:,} more"] if more else told

    def _judge(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self._taken = []  # left behind by a step that raised
        veto, paused = self._veto, self._paused
        if (veto is None and not paused) or any(map(callable, args[1:])) or (kwargs or {}).get("closure") is not None:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        held = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return
        if paused:
            self._take(held)
            return
        assert veto is not None
        scale = getattr(self._optimizer, "grad_scale", None)  # fused: the gradients still carry the scaler's factor
        norm = self._read(_norm([p.grad for p in held], scale))
        if not math.isfinite(norm) and getattr(self._optimizer, "found_inf", None) is not None:
            return  # the scaler skips this step itself, and halves its scale
        judged = self._baseline.judge(norm, veto)
        if not judged.refused:
            return
        if not veto.dry:
            self._take(held)
        self._count += 1
        if len(self._told) < _TOLD:
            done = "would have been skipped" if veto.dry else "was skipped"
            self._told.append(f"{judged.reason}: the optimizer step {done}")
        else:
            self._untold += 1

    def _take(self, held: list[torch.Tensor]) -> None:
        """Take the gradients away for the time of the step."""
        self._taken = [(p, p.grad) for p in held if p.grad is not None]
        for parameter in held:
            parameter.grad = None

    def _give_back(self) -> None:
        """Give the gradients back: a loop may look at them after the step."""
        for parameter, gradient in self._taken:
            if parameter.grad is None:
                parameter.grad = gradient
        self._taken = []

    def _quietly(self, act: Callable[..., None], *args: Any) -> None:
        """Act inside the optimizer's step, where nothing of ours may raise."""
        try:
            act(*args)
        except Exception as error:  # noqa: BLE001 - gradients of a kind that has no norm
            self._veto = None
            _log.warning("optimizer steps are not vetoed any more: %s: %s", type(error).__name__, error)


def _norm(gradients: Iterable[torch.Tensor], scale: torch.Tensor | None) -> torch.Tensor:
    """Return the norm of all gradients together; half precision is summed in float32, where it does not overflow."""
    flat = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    narrow = [g for g in flat if g.element_size() < torch.float32.itemsize]
    wide = [g for g in flat if g.element_size() >= torch.float32.itemsize]
    norms = [
        *(torch._foreach_norm(narrow, 2, torch.float32) if narrow else ()),  # noqa: SLF001
        *(torch._foreach_norm(wide) if wide else ()),  # noqa: SLF001
    ]
    home = norms[0].device  # a model may be spread over several
    if len({(n.device, n.dtype) for n in norms}) > 1:
        norms = [n.to(home, torch.float64 if home.type != "mps" else torch.float32) for n in norms]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total if scale is None else total / scale.to(home)
