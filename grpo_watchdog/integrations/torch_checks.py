"""The look at the state of the model: the reference, what is trained, what is finite, and how far it moved.

Nothing is copied whole: the reference is compared by the norms of its tensors, the movement of the weights is
taken on evenly spaced elements, at most SAMPLE of a tensor (exact for tensors no larger).
"""

from __future__ import annotations

import torch

from grpo_watchdog.controls import Check
from grpo_watchdog.integrations.torch_state import first_nonfinite

SAMPLE = 4096
_LORA = ("lora_", "modules_to_save")


class ModelChecks:
    """Looks at one model, its optimizer and its reference.

    Args:
        model: the policy.
        optimizer: the one that trains it.
        reference: the frozen policy that the KL is taken to, or None where there is none to look at.
        every: optimizer steps between measurements of `param_change`; 0 measures none.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, reference: torch.nn.Module | None, every: int
    ) -> None:
        """Take the fingerprints of now."""
        self._model, self._optimizer, self._reference = model, optimizer, reference
        self._norms = _norms(reference)
        self._trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        self._every, self._steps = every, 0
        self._change: torch.Tensor | None = None
        self._before: list[torch.Tensor] | None = None
        self._start = self._origin()
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def inspect(self) -> list[Check]:
        """Return all checks. Costs one norm per tensor."""
        state = ((f"{k}.{i}", v) for i, s in enumerate(self._optimizer.state.values()) for k, v in s.items()
                 if isinstance(v, torch.Tensor))  # fmt: skip
        weights = first_nonfinite(self._model.state_dict().items())
        moments = first_nonfinite(state)
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
        now = _samples(self._trained())
        drift = _relative(now, self._start) if self._start else None
        found = {"param_change": self._change, "param_drift": drift}
        return {name: float(value) for name, value in found.items() if value is not None}

    def _look_at_reference(self, reference: torch.nn.Module) -> Check:
        mine = {p.data_ptr() for p in self._model.parameters() if p.requires_grad and p.numel()}
        faults = []
        if reference is self._model or any(p.data_ptr() in mine for p in reference.parameters()):
            faults.append("it is the policy itself, or shares trained weights with it")
        if any(p.requires_grad for p in reference.parameters()):
            faults.append("it is not frozen (requires_grad)")
        if any(module.training for module in reference.modules()):
            faults.append("it is in train mode, not eval")
        if _norms(reference) != self._norms:
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
            faults.append(f"what is trained changed since attach: {sorted(trained ^ self._trainable)[0]}")
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


def _samples(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return up to SAMPLE evenly spaced elements of each tensor, copied, as float32 where they are narrower."""
    flat = [t.reshape(-1)[:: max(1, -(-t.numel() // SAMPLE))] for t in tensors if t.numel()]
    return [t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in flat]


def _relative(now: list[torch.Tensor], then: list[torch.Tensor]) -> torch.Tensor:
    """Return |now - then| / |then| over all samples, as a 0-d tensor."""
    moved = torch.stack([(a - b.to(a.device)).norm() for a, b in zip(now, then, strict=True)]).norm()
    size = torch.stack([b.to(a.device).norm() for a, b in zip(now, then, strict=True)]).norm()
    return moved / size.clamp_min(torch.finfo(size.dtype).tiny)


def _norms(module: torch.nn.Module | None) -> list[float]:
    tensors = [] if module is None else [p.detach() for p in module.parameters()]
    return [float(norm) for norm in torch._foreach_norm(tensors)] if tensors else []  # noqa: SLF001
