"""What a fire drill proves of a torch training, each from the state that the training is in."""

from __future__ import annotations

import inspect
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_watchdog.controls import Knob, Veto
from grpo_watchdog.integrations.torch_snapshot import HEAVY, Subject, differs, everything, put_back, trained
from grpo_watchdog.integrations.torch_state import KNOBS
from grpo_watchdog.integrations.torch_stir import SEED, draw, nudge, same_numbers, stir

Loss = Callable[[], torch.Tensor]
_TENTH, _SHRUNK = 0.1, 0.25  # a ceiling at a tenth must leave less than a quarter of the update
_BELOW_ALL = -0.5  # a clip range that moves every sample, also one whose ratio is exactly 1


class FailedError(Exception):
    """What should have been so and is not."""


class UnprovenError(Exception):
    """Why something cannot be tried."""


class Range:
    """Where the proofs are tried."""

    def __init__(
        self, subject: Subject, loss: Loss | None, before: Mapping[str, Any], in_place: Callable[[], None]
    ) -> None:
        self.subject, self._loss, self._before, self._in_place = subject, loss, before, in_place
        self._held = [p for p in trained(subject.optimizer) if p.requires_grad]
        self._gradients: list[torch.Tensor] | None = None
        closure = inspect.signature(type(subject.optimizer).step).parameters.get("closure")
        self._closed = closure is not None and closure.default is inspect.Parameter.empty
        own = [p for p in subject.parts if p.name not in (*HEAVY, KNOBS)]
        self._others = [p for p in own if not p.name.startswith("rng.")]
        self.untold: list[str] = []  # what a checkpoint holds and nobody can tell whether it comes back

    def learning_rate(self) -> str:
        """Prove that a ceiling at a tenth leaves a tenth of the update, and that it lifts."""
        knob = self.subject.knobs.get("learning_rate")
        if knob is None:
            raise UnprovenError("there is no learning-rate knob: this optimizer finds its own rate")
        self._wake()
        rates = [rate for group in self.subject.optimizer.param_groups if (rate := float(group["lr"])) > 0]
        free = self._update()
        size = small = _norm(free)
        if not size:
            raise FailedError("an optimizer step changes no weight at all")
        for limit in (_TENTH * max(rates), _TENTH * min(rates)):  # groups may have wandered from their shares
            knob.hold(limit)
            small = _norm(self._update())
            if small <= _SHRUNK * size:
                break
        knob.release()
        again = self._update()
        if small > _SHRUNK * size:
            raise FailedError(
                f"under a ceiling of a tenth ({limit:.3g}) the update is {small / size:.2f} of what it was: something "
                "raises it, or this optimizer does not heed its rate"
            )
        if not all(map(torch.equal, free, again)):
            raise FailedError("after the release the update is not what it was")
        return (
            f"under a ceiling of a tenth ({limit:.3g}) the update is {small / size:.3f} of what it was; lifted, the "
            "same to the bit"
        )

    def seen_by_loss(self, name: str) -> str:
        """Prove that the loss moves with a setting, and is what it was once that is released."""
        knob = self.subject.knobs.get(name)
        if knob is None:
            raise UnprovenError(f"there is no {name} knob: this dose cannot be given")
        own = knob.own()
        limit = max(10 * own, 1.0) if name == "kl_coef" else 1e-3 * own
        self._takes(knob, limit)
        if limit == own:
            raise UnprovenError(f"it is {own:g}: there is nothing to shrink")
        if self._loss is None:
            raise UnprovenError("no loss to look at: dog.drill(loss=...) takes a function that computes one")
        nudge(self._held)
        first, again = self._value(), self._value()
        if first != again:
            raise UnprovenError(
                "the loss is not the same twice, with the random numbers put back: nothing can be compared"
            )
        knob.hold(limit)
        held = self._value()
        knob.release()
        lifted = self._value()
        if held == first:
            if name == "clip_epsilon" and self._reads(knob, first):
                raise UnprovenError(
                    "the loss reads it, but has nothing to clip: every ratio in it is 1; a loss of samples that were "
                    "drawn a few updates ago has others"
                )
            raise FailedError(
                f"the loss is {first:.6g} with {own:g} and with {limit:g}, to the bit: nobody reads {knob.where}"
            )
        if lifted != first:
            raise FailedError(f"after the release the loss is {lifted:.6g}, and was {first:.6g}")
        return (
            f"with {own:g} held at {limit:g} the loss goes from {first:.6g} to {held:.6g}; lifted, the same to the bit"
        )

    def grad_norm_limit(self) -> str:
        """Prove that the number takes and lifts; what the loop does with it happens where no drill can look."""
        knob = self.subject.knobs["grad_norm_limit"]
        self._takes(knob, _TENTH * knob.own())
        raise UnprovenError("the number takes and lifts; whether the loop clips gradients to it, no loss can show")

    def veto(self) -> str:
        """Prove that a gradient with a NaN in it changes nothing, and that a good one still does."""
        veto = self.subject.veto
        gradients = [g.clone() for g in self._gradient()]
        self._wake()
        before = everything(self.subject.parts)
        sick = max(gradients, key=torch.Tensor.numel)
        sick[(0,) * sick.dim()] = math.nan
        veto.arm(Veto())
        self._step(gradients)
        alike(before, everything(self.subject.parts), "a step with a NaN gradient changed")
        veto.vetoed()
        self._must_move(before)
        return "a NaN gradient left weights and moments as they were; the next step went through"

    def pause(self) -> str:
        """Prove that a paused optimizer changes nothing."""
        gradients = self._gradient()
        self._wake()
        before = everything(self.subject.parts)
        self.subject.veto.pause(on=True)
        self._step(gradients)
        alike(before, everything(self.subject.parts), "a paused step changed")
        self.subject.veto.pause(on=False)
        self._must_move(before)
        return "a paused step left weights and moments as they were; lifted, the next one went through"

    def checkpoint(self) -> str:
        """Prove that a checkpoint brings everything back, to the bit, once all that can be is something else."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self._gradient()
            self._walk(1)  # so that there are moments to bring back
            before = everything(self.subject.parts)
            began = time.perf_counter()
            self.subject.save(folder)
            saved = time.perf_counter()
            self._walk(2)
            nudge(self._held)
            draw()
            meanwhile = stir(self._others)
            changed = time.perf_counter()
            self.subject.restore(folder)
            restored = time.perf_counter()
            alike(before, everything(self.subject.parts), "restored, it differs:")
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.untold += meanwhile.untold
        if meanwhile.dropped:
            raise FailedError(
                f"{meanwhile.dropped[0]} is in the state that is saved, and its load leaves it alone: it does not come "
                "back (what never changes has no place in a state)"
            )
        return (
            f"{size / 1e6:.1f} MB, saved in {saved - began:.2f} s, restored in {restored - changed:.2f} s, "
            "the same to the bit"
        )

    def scheduler(self) -> str:
        """Prove that no scheduler turns this optimizer that a rollback would not bring back."""
        scheduled = any("initial_lr" in group for group in self.subject.optimizer.param_groups)
        if scheduled and not self.subject.scheduled:
            raise FailedError(
                "the optimizer has a scheduler that was not handed over: attach(..., scheduler=scheduler)"
            )
        if self.subject.scheduled:
            return "handed over: saved, restored and never disturbed"
        return "there is none on this optimizer yet"

    def _wake(self) -> None:
        """Give the optimizer its base rate where a warm-up has it at 0 just now: the state is put back after."""
        groups, knob = self.subject.optimizer.param_groups, self.subject.knobs.get("learning_rate")
        if knob is not None and not any(float(group["lr"]) for group in groups):
            for group in groups:
                _set_rate(group, float(group.get("initial_lr") or knob.base() or 1e-3))

    def _takes(self, knob: Knob, limit: float) -> None:
        """Raise unless the number takes and lifts, whoever reads it."""
        free = knob.read()
        knob.hold(limit)
        held = knob.read()
        knob.release()
        if not math.isclose(held, limit, rel_tol=1e-5):
            raise FailedError(f"held at {limit:g}, {knob.where} reads {held:g}")
        if knob.read() != free:
            raise FailedError(f"after the release {knob.where} reads {knob.read():g}, and was {free:g}")

    def _reads(self, knob: Knob, first: float) -> bool:
        """Return whether the loss reads a clip range that shows nowhere because there is nothing to clip."""
        try:
            knob.hold(_BELOW_ALL)
            return self._value() != first
        except Exception:  # noqa: BLE001 - somebody refuses such a range: it cannot be told
            return False
        finally:
            knob.release()

    def _update(self) -> list[torch.Tensor]:
        """Return what one step changes, from the weights and moments that the training has."""
        gradients, groups = self._gradient(), self.subject.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        self._in_place()
        for group, rate in zip(self.subject.optimizer.param_groups, rates, strict=True):
            _set_rate(group, rate)
        then = [p.detach().clone() for p in self._held]
        self._step(gradients)
        return [p.detach() - old for p, old in zip(self._held, then, strict=True)]

    def _walk(self, steps: int) -> None:
        for _ in range(0 if self._closed else steps):
            self._step(self._gradient())

    def _step(self, gradients: Sequence[torch.Tensor]) -> None:
        if self._closed:
            raise UnprovenError("this optimizer computes its gradients inside its step, which no drill can do for it")
        kept = [p.grad for p in self._held]  # a loop may be amid accumulation
        try:
            for p, gradient in zip(self._held, gradients, strict=True):
                p.grad = gradient.clone()
            self.subject.optimizer.step()
        finally:
            for p, own in zip(self._held, kept, strict=True):
                p.grad = own

    def _gradient(self) -> list[torch.Tensor]:
        """Return a gradient: the loss's own where there is one, always the same."""
        if self._gradients is None:
            found: list[torch.Tensor | None] = [None] * len(self._held)
            if self._loss is not None:
                kept = [p.grad for p in self._held]
                try:
                    for p in self._held:
                        p.grad = None
                    with same_numbers():
                        self._loss().backward()
                    found = [p.grad for p in self._held]
                finally:
                    for p, own in zip(self._held, kept, strict=True):
                        p.grad = own
            source = torch.Generator().manual_seed(SEED)
            self._gradients = []
            for p, got in zip(self._held, found, strict=True):
                made = 1e-3 * torch.randn(p.shape, generator=source)
                alive = got is not None and bool(got.isfinite().all()) and bool(got.any())
                self._gradients.append(got if alive and got is not None else made.to(p))
        return self._gradients

    def _value(self) -> float:
        """Return the loss, of the same samples and the same random numbers each time."""
        assert self._loss is not None
        put_back(self._others, self._before)  # a sampler, say
        with same_numbers():
            return float(self._loss().detach())

    def _must_move(self, before: Mapping[str, Any]) -> None:
        self._step(self._gradient())
        try:
            alike(before, everything(self.subject.parts))
        except FailedError:
            return
        raise FailedError("the next step changed nothing: it does not lift")


def alike(before: Mapping[str, Any], now: Mapping[str, Any], told: str = "not as it was:") -> str:
    """Return a word where two states are the same to the bit; raise where not, with what differs first."""
    for name, state in before.items():
        place = differs(state, now[name], name)
        if place:
            raise FailedError(f"{told} {place}")
    return "weights, moments, settings and random numbers are the same to the bit"


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
