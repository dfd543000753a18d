"""A tiny real training, and what it takes to compare two of them bit by bit."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_watchdog as gw
from grpo_watchdog.integrations.torch_codec import decode

HEALTHY = {"log_ratio": 0.0}


class Config:
    """What the loss reads on every step."""

    def __init__(self) -> None:
        self.beta = 0.1
        self.epsilon = 0.2


class Accumulator:
    """Counts micro-steps and keeps the gradients that are not yet applied."""

    def __init__(self, model: torch.nn.Module, every: int) -> None:
        self.model, self.every, self.count = model, every, 0

    def state_dict(self) -> dict[str, Any]:
        grads = [p.grad for p in self.model.parameters()]
        return {"count": self.count, "grads": [None if g is None else g.clone() for g in grads]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        for parameter, gradient in zip(self.model.parameters(), state["grads"], strict=True):
            parameter.grad = gradient


class Training:
    """A policy that drops out and samples from four generators; its loss reads the KL coefficient and the clip."""

    def __init__(self, seed: int, *, scaled: bool = False, accumulate: int = 1) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what is restored
        random.seed(seed)
        self.first, self.norm, self.last = torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 2)
        self.model = torch.nn.Sequential(self.first, self.norm, torch.nn.Tanh(), torch.nn.Dropout(0.2), self.last)
        first, *rest = self.model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 1e-4}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=200)
        self.sampler = torch.Generator().manual_seed(seed)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7) if scaled else None
        self.accumulator = Accumulator(self.model, accumulate)
        self.config = Config()
        self.ceiling: float | None = None  # a cap applied by hand, for runs without a watchdog
        self.data = torch.linspace(-1, 1, 60 * 6).reshape(60, 6)

    def handed_over(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "accumulator": self.accumulator}

    def step(self) -> None:
        rows = torch.randint(0, 60, (8,), generator=self.sampler)
        noise = torch.as_tensor(np.random.standard_normal((8, 6)), dtype=torch.float32)  # noqa: NPY002
        logits = self.model(self.data[rows] + 0.1 * noise + 0.01 * random.random())
        logp = torch.log_softmax(logits, -1)[:, 0]
        ratio = torch.exp(logp - logp.detach() + 0.3 * torch.randn(8))
        advantage = torch.where(rows % 2 == 0, 1.0, -1.0)
        clipped = ratio.clamp(1 - self.config.epsilon, 1 + self.config.epsilon)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage).mean()
        loss = -surrogate + self.config.beta * ((logp + 0.7) ** 2 / 2).mean()
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
        self.accumulator.count += 1
        if self.accumulator.count % self.accumulator.every:
            return
        own = [group["lr"] for group in self.optimizer.param_groups]
        if self.ceiling is not None:
            bases = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
            for group, base in zip(self.optimizer.param_groups, bases, strict=True):
                group["lr"] = min(group["lr"], self.ceiling * (base / max(bases)))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        for group, rate in zip(self.optimizer.param_groups, own, strict=True):
            group["lr"] = rate
        self.scheduler.step()
        self.optimizer.zero_grad()

    def snapshot(self) -> dict[str, Any]:
        """Return copies of everything that the next step depends on."""
        found = copied({
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "sampler": self.sampler.get_state(),
            "accumulator": self.accumulator.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "torch": torch.get_rng_state(),
        })  # fmt: skip
        assert isinstance(found, dict)
        return found

    def resume_by_hand(self, folder: Path) -> None:
        """Load a checkpoint's files without any help from the watchdog but its codec."""
        self.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        rest = decode(torch.load(folder / "training.pt", weights_only=True))
        self.scheduler.load_state_dict(rest["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(rest["scaler"])
        self.sampler.set_state(rest["sampler"])
        self.accumulator.load_state_dict(rest["accumulator"])
        random.setstate(rest["rng.python"])
        np.random.set_state(rest["rng.numpy"])  # noqa: NPY002
        torch.set_rng_state(rest["rng.torch"])


def copied(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    return value


def differences(one: Any, other: Any, where: str = "") -> list[str]:  # noqa: ANN401
    """Return where two states differ, by a bit; type, order and not-a-number count."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Mapping):
        if list(map(repr, one)) != list(map(repr, other)):
            return [f"{where}: keys {list(one)} and {list(other)}"]
        pairs = zip(one.items(), other.values(), strict=True)
        return [text for (k, a), b in pairs for text in differences(a, b, f"{where}.{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        return [t for i, (a, b) in enumerate(zip(one, other, strict=True)) for t in differences(a, b, f"{where}[{i}]")]
    if isinstance(one, torch.Tensor | np.ndarray | np.generic):
        alike = one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)
    else:
        alike = one == other or (one != one and other != other)  # noqa: PLR0124 - not-a-number
    return [] if alike else [f"{where}: {one!r} and {other!r}"]


def raw(value: Any) -> bytes:  # noqa: ANN401
    if not isinstance(value, torch.Tensor):
        return bytes(value.tobytes())
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def attaching() -> Iterator[Callable[..., gw.Watchdog]]:
    """Yield gw.attach, and close what it made in the end; the body of a fixture."""
    dogs: list[gw.Watchdog] = []

    def attach(**options: Any) -> gw.Watchdog:
        dogs.append(gw.attach(**options))
        return dogs[-1]

    yield attach
    for dog in dogs:
        dog.close()
