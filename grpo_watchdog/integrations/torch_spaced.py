"""A lane: evenly spaced elements of some tensors, kept to the bit and compared with what is there later.

The elements are views into the tensors, looked up once and gathered by one `cat` for each device and type, so a look
at a model takes a few kernels. What is alike costs no arithmetic on the host and no transfer from a device.

A view keeps the memory of its tensor: weights that are moved elsewhere between two steps free theirs at the next look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from grpo_watchdog.integrations.torch_checks import SAMPLE, sample

Named = list[tuple[str, torch.Tensor]]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Lot(NamedTuple):
    """The elements on one device and of one type.

    Attributes:
        views: into the tensors.
        apart: which of them are whole tensors, with gaps in memory: their elements are copied out at each look.
        spans: where each kind lies in the buffers.
        scale: makes the norm of the elements estimate that of the tensors; None where all elements are there.
        now: what was there at the last look.
        kept: what is compared with.
    """

    views: list[torch.Tensor]
    apart: list[int]
    spans: list[tuple[str, slice]]
    scale: torch.Tensor | None
    now: torch.Tensor
    kept: torch.Tensor


class Lane:
    """Some tensors that are looked at together.

    Args:
        find: returns the tensors of now, each with the kind that it is measured with.
        same: returns whether it would still return the very same tensors as the last time.
    """

    def __init__(self, find: Callable[[], Named], same: Callable[[], bool]) -> None:
        """Look at nothing yet."""
        self._find, self._same = find, same
        self._found = False
        self._form: list[tuple[object, ...]] = []
        self._lots: list[_Lot] = []
        self.kept = False

    def look(self) -> bool:
        """Look at what is there; return whether it can be compared with what is kept: as many, of the same form."""
        comparable = self._renew()
        for lot in self._lots:
            _gather(lot, lot.now)
        return comparable and self.kept

    def keep(self) -> bool:
        """Keep what is there; return whether it can be compared with the last look."""
        comparable = self._renew()
        for lot in self._lots:
            _gather(lot, lot.kept)
        self.kept = True
        return comparable

    def touched(self) -> torch.Tensor | None:
        """Look, and return how far what is there is from what is kept: the worst kind; None where it is alike.

        Tensors that were added, or moved to another device or type, are no difference; ones that are gone count as
        set to 0.
        """
        before = len(self._form) if self.kept else 0
        if self.look():
            alike = all(lot.now.device.type == "cpu" and torch.equal(lot.now, lot.kept) for lot in self._lots)
            return None if alike else _relative([(lot, lot.now, lot.kept) for lot in self._lots])
        if before:
            self.keep()
        return torch.ones((), dtype=torch.float64) if len(self._form) < before else None

    def step(self) -> torch.Tensor | None:
        """Return how far what is kept is from the last look, all kinds together."""
        far, sizes = [], []
        for lot in self._lots:
            moved, then = lot.kept, lot.now
            if then.element_size() < torch.float32.itemsize:
                moved, then = moved.float(), then.float()
            moved = moved - then
            if lot.scale is not None:
                moved, then = moved * lot.scale, then * lot.scale
            far.append(torch.linalg.vector_norm(moved))
            sizes.append(torch.linalg.vector_norm(then))
        return _together(far) / _together(sizes).to(far[0].device) if far else None

    def _renew(self) -> bool:
        """Look the tensors up where others stand in their place now; return whether the form is the same."""
        if self._found and self._same():
            return True
        found, self._found = [(kind, t) for kind, t in self._find() if _can_be_watched(t)], True
        form: list[tuple[object, ...]] = [(kind, t.shape, t.stride(), t.dtype) for kind, t in found]
        old, self._lots = self._lots, list(_lots(found))
        same = form == self._form and [len(a.now) for a in old] == [len(b.now) for b in self._lots]
        if same:  # what is kept stays comparable, on whatever device they are now
            home = [lot.now.device for lot in self._lots]
            carried = [(a.now.to(device), a.kept.to(device)) for a, device in zip(old, home, strict=True)]
            self._lots = [b._replace(now=n, kept=k) for b, (n, k) in zip(self._lots, carried, strict=True)]
        self._form, self.kept = form, self.kept and same
        return same


def _can_be_watched(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() in _BITS and tensor.numel() > 0


def wide(tensor: torch.Tensor) -> torch.dtype:
    """Return the type that norms are taken in: squares of small moments are no number in float32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _lots(found: Named) -> Iterator[_Lot]:
    by_home: dict[tuple[torch.device, torch.dtype], Named] = {}
    for kind, tensor in found:
        by_home.setdefault((tensor.device, tensor.dtype), []).append((kind, tensor))
    for (device, dtype), named in by_home.items():
        views: list[torch.Tensor] = []
        apart, spans, scales, end = [], [], [], 0
        for kind in dict.fromkeys(kind for kind, _ in named):
            start = end
            for tensor in (t.detach() for k, t in named if k == kind):
                view = _view(tensor)
                if view is None:
                    apart.append(len(views))
                size = sample(tensor).numel() if view is None else view.numel()
                views.append(tensor if view is None else view)
                scales.append(((tensor.numel() / size) ** 0.5, size))
                end += size
            spans.append((kind, slice(start, end)))
        scale = None
        if any(factor != 1 for factor, _ in scales):
            scale = torch.cat([torch.full((size,), factor) for factor, size in scales]).to(device)
        now, kept = torch.empty(end, dtype=dtype, device=device), torch.empty(end, dtype=dtype, device=device)
        yield _Lot(views, apart, spans, scale, now, kept)


def _view(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return up to SAMPLE evenly spaced elements in the order of memory, as a view; None where there are gaps in it."""
    size = tensor.numel()
    if sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 != size:
        return None
    spacing = -(-size // SAMPLE)
    while spacing > 1 and any(math.gcd(spacing, n) > 1 for n in tensor.shape):  # or they may lie in a few columns
        spacing += 1
    return tensor.as_strided((-(-size // spacing),), (spacing,))


def _gather(lot: _Lot, into: torch.Tensor) -> None:
    views = lot.views
    if lot.apart:
        views = list(views)
        for index in lot.apart:
            views[index] = sample(views[index]).to(into.dtype)
    torch.cat(views, out=into)


def _relative(lots: list[tuple[_Lot, torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """Return |now - then| / |then|, of the kind where it is largest; NaN where something is not finite."""
    moved: dict[str, list[torch.Tensor]] = {}
    sizes: dict[str, list[torch.Tensor]] = {}
    for lot, now, then in lots:
        norms_in = wide(now)
        bits = _BITS[now.element_size()]
        difference = now.to(norms_in) - then.to(norms_in)
        difference.masked_fill_(now.view(bits) == then.view(bits), 0.0)  # NaN that stays NaN was not touched
        weighed = then.to(norms_in)
        if lot.scale is not None:
            difference, weighed = difference * lot.scale, weighed * lot.scale
        for kind, span in lot.spans:
            moved.setdefault(kind, []).append(torch.linalg.vector_norm(difference[span]))
            sizes.setdefault(kind, []).append(torch.linalg.vector_norm(weighed[span]))
    if not moved:
        return None
    far, size = (torch.stack([_together(norms) for norms in found.values()]) for found in (moved, sizes))
    size = size.to(far.device)
    return torch.where(far == 0, torch.zeros_like(far), far / size).max()


def _together(norms: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of several devices' parts together."""
    if len(norms) == 1:
        return norms[0]
    home = norms[0].device
    kind = max((norm.dtype for norm in norms), key=lambda kind: kind.itemsize)
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(home, kind) for norm in norms]))
    return total
