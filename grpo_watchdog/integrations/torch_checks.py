"""The look at the state of the model: the reference, what is trained, what is finite, and how far it moved.

Nothing is copied whole: the reference is compared by the norms of its tensors and by some of their elements, the
movement of the weights is taken on evenly spaced elements, at most SAMPLE of a tensor (exact for tensors no larger).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from grpo_watchdog.controls import Check
from grpo_watchdog.integrations.torch_finite import FiniteCheck

SAMPLE = 4096
_LORA = ("lora_", "modules_to_save")
_log = logging.getLogger("grpo_watchdog")


class ModelChecks:
    """Looks at one model, its optimizer and its reference.

    Args:
        model: the policy.
        optimizer: the one that trains it.
        reference: the frozen policy that the KL is taken to, or None where there is none to look at.
        finite: looks for weights and moments that are not finite.
        every: optimizer steps between measurements of `param_change`; 0 measures none.
    """

    REMEMBERS = ("_steps", "_change", "_before")

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        reference: torch.nn.Module | None,
        finite: FiniteCheck,
        every: int,
        *,
        freezes: bool = True,
    ) -> None:
        """Take the fingerprints of now."""
        self._model, self._optimizer, self._reference = model, optimizer, reference
        self._finite, self._freezes = finite, freezes
        self._fingerprint = _fingerprint(reference)
        self._trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        self._every, self._steps = every, 0
        self._change: torch.Tensor | None = None
        self._before: list[torch.Tensor] | None = None
        self._start = self._origin()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._quietly(self._before_step)),
            optimizer.register_step_post_hook(lambda *_: self._quietly(self._after_step)),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def inspect(self) -> list[Check]:
        """Return all checks. Costs one norm per tensor."""
        weights, moments = self._finite.weights(), self._finite.moments()
        return [
            *([] if self._reference is None else [self._look_at_reference(self._reference)]),
            self._look_at_trainable(),
            Check("parameters", not weights, f"{weights} is not finite" if weights else "all parameters are finite"),
            Check(
                "optimizer_state",
                not moments,
                f"{moments} is not finite" if moments else "the optimizer state is finite",
            ),
        ]

    def measure(self) -> dict[str, float]:
        """Return param_change (of the last measured step) and param_drift (from the reference, else from attach)."""
        found = {"param_change": self._change, "param_drift": _relative(_samples(self._trained()), self._start)}
        return {name: float(value) for name, value in found.items() if value is not None}

    def _look_at_reference(self, reference: torch.nn.Module) -> Check:
        mine = {p.data_ptr() for p in self._model.parameters() if p.requires_grad and p.numel()}
        faults = []
        if reference is self._model or any(p.data_ptr() in mine for p in reference.parameters()):
            faults.append("it is the policy itself, or shares trained weights with it")
        if self._freezes and any(p.requires_grad for p in reference.parameters()):
            faults.append("it is not frozen (requires_grad)")
        if any(module.training for module in reference.modules()):
            faults.append("it is in train mode, not eval")
        if not _same(_fingerprint(reference), self._fingerprint):
            faults.append("its weights changed since attach")
        return Check(
            "reference",
            not faults,
            "the reference: " + ("; ".join(faults) or "frozen, in eval mode, unchanged since attach"),
        )

    def _look_at_trainable(self) -> Check:
        named = dict(self._model.named_parameters())
        trained = {n for n, p in named.items() if p.requires_grad}
        adapters = {n for n in named if any(mark in n for mark in _LORA)}
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        faults = []
        if adapters and trained - adapters:
            extra = sorted(trained - adapters)
            faults.append(f"{len(extra)} tensors outside the LoRA adapters are trained, {extra[0]} first")
        if trained != self._trainable:
            faults.append(f"what is trained changed since attach: {min(trained ^ self._trainable)}")
        left_out = sorted(n for n in trained if id(named[n]) not in held)
        if left_out:
            faults.append(f"{len(left_out)} trainable tensors are not in this optimizer, {left_out[0]} first")
        count = sum(named[n].numel() for n in trained)
        kind = "LoRA adapters only" if adapters else "no adapters found: full fine-tuning"
        return Check("trainable", not faults, "; ".join(faults) or f"{count:,} parameters are trained; {kind}")

    def _trained(self) -> list[torch.Tensor]:
        return [p.detach() for n, p in self._model.named_parameters() if n in self._trainable]

    def _origin(self) -> list[torch.Tensor]:
        there = {} if self._reference is None else dict(self._reference.named_parameters())
        own = {n: p for n, p in self._model.named_parameters() if n in self._trainable}
        if all(n in there and there[n].shape == p.shape for n, p in own.items()):
            own = {n: there[n] for n in own}
        return _samples([p.detach() for p in own.values()])

    def _before_step(self) -> None:
        if self._every and self._steps % self._every == 0:
            self._before = _samples(self._trained())
        self._steps += 1

    def _after_step(self) -> None:
        if self._before is not None:
            self._change = _relative(_samples(self._trained()), self._before)
            self._before = None

    def _quietly(self, act: Callable[[], None]) -> None:
        """Act inside the optimizer's step, where nothing of ours may raise."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - weights of a kind that cannot be sampled
            self._every, self._before = 0, None
            _log.warning("param_change is not measured any more: %s: %s", type(error).__name__, error)


def _samples(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of some elements of each tensor, scaled such that their norm estimates that of the tensor."""
    picked = [(sample(t), t.numel()) for t in tensors if t.numel()]
    return [sample * (size / sample.numel()) ** 0.5 for sample, size in picked]


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of up to SAMPLE evenly spaced elements, as float32 where they are narrower."""
    stride = -(-tensor.numel() // SAMPLE)
    while stride > 1 and math.gcd(stride, tensor.shape[-1]) > 1:  # or all of them may lie in a few columns
        stride += 1
    if tensor.is_contiguous():
        picked = tensor.view(-1)[::stride]
    else:  # reshape would copy it whole
        places = torch.arange(0, tensor.numel(), stride, device=tensor.device)
        picked = tensor[torch.unravel_index(places, tensor.shape)]
    return picked.to(_wide(tensor), copy=True)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.element_size() < torch.float32.itemsize else tensor.dtype


def _relative(now: list[torch.Tensor], then: list[torch.Tensor]) -> torch.Tensor | None:
    """Return |now - then| / |then| over all samples, as a 0-d tensor; None where there is nothing to compare."""
    if not then or len(now) != len(then):
        return None
    home = now[0].device  # a model may be spread over several
    moved = [torch.linalg.vector_norm(a - b.to(a.device)).to(home) for a, b in zip(now, then, strict=True)]
    sizes = [torch.linalg.vector_norm(b).to(home) for b in then]
    size: torch.Tensor = torch.linalg.vector_norm(torch.stack(sizes))
    change: torch.Tensor = torch.linalg.vector_norm(torch.stack(moved))
    return change / size.clamp_min(torch.finfo(size.dtype).tiny)


def _fingerprint(module: torch.nn.Module | None) -> list[torch.Tensor]:
    """Return some elements and the norm of each tensor: a norm alone misses a small step across it."""
    marks = []
    for tensor in (p.detach() for p in (module.parameters() if module else ()) if p.numel()):
        marks.append(sample(tensor).nan_to_num())
        if tensor.is_floating_point() and tensor.element_size() > 1:
            marks.append(torch.linalg.vector_norm(tensor, dtype=_wide(tensor)).nan_to_num())
    return marks


def _same(now: list[torch.Tensor], then: list[torch.Tensor]) -> bool:
    return len(now) == len(then) and all(
        a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in zip(now, then, strict=True)
    )
