"""What of a training must be finite: the weights, and what the optimizer keeps for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

_NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FiniteCheck:
    """Finds the first tensor of a model and its optimizer that is not finite.

    Buffers that are not finite to begin with are left out: an attention mask is made of -inf.

    Args:
        model: its parameters and persistent buffers are looked at.
        optimizer: every tensor of its state is looked at.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look at the buffers once."""
        self._model, self._optimizer = model, optimizer
        self._exempt = {name for name, buffer in model.named_buffers() if first_nonfinite([(name, buffer)])}

    def weights(self) -> str:
        """Return the name of the first weight that is not finite, or ""."""
        kept = self._model.state_dict(keep_vars=True)
        return first_nonfinite((n, t) for n, t in kept.items() if n not in self._exempt)

    def moments(self) -> str:
        """Return the first optimizer moment that is not finite, as "exp_avg of layer.weight", or ""."""
        names = {id(p): n for n, p in self._model.named_parameters()}
        return first_nonfinite(
            (f"{key} of {names.get(id(parameter), 'a parameter outside the model')}", value)
            for parameter, kept in self._optimizer.state.items()
            for key, value in kept.items()
        )


def first_nonfinite(named: Iterable[tuple[str, object]]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, or "". One norm a tensor where all are finite."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, value in named:
        if isinstance(value, torch.Tensor) and value.numel() and (value.is_floating_point() or value.is_complex()):
            by_kind.setdefault((value.device, value.dtype), []).append((name, value.detach()))
    return next(itertools.chain.from_iterable(map(_sick, by_kind.values())), "")


def _sick(group: list[tuple[str, torch.Tensor]]) -> Iterable[str]:
    if group[0][1].dtype in _NORMED:  # two orders of magnitude faster than isfinite a tensor
        norms = torch._foreach_norm([t for _, t in group])  # noqa: SLF001
        if bool(torch.isfinite(torch.stack(list(norms)).sum())):
            return
    for name, tensor in group:  # a norm may overflow where every element is finite
        narrow = tensor.is_floating_point() and tensor.element_size() == 1  # float8 knows no isfinite
        if not bool(torch.isfinite(tensor.float() if narrow else tensor).all()):
            yield name
