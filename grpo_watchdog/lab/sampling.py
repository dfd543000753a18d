"""Where a training's samples come from: the stream that decides the data, and the sampler that has a state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rollout(NamedTuple):
    """One batch of samples; B samples, each of K steps or tokens."""

    prompt: Tensor  # [B] or [B, C]
    sample: Tensor  # [K+1, B, D], a path, or [B, K], tokens
    log_prob_BK: Tensor  # under the sampler, with its own weights and settings [nats], float64
    mask_BK: Tensor | None = None  # 1 where a token counts, 0 elsewhere; None where everything counts
    dims: int = 1  # dimensions that each log-prob is summed over


class Stream:
    """The one source of a training's randomness: prompts and noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers of the given shape."""
        return torch.randn(shape, generator=self.generator)

    def exponential(self, *shape: int) -> Tensor:
        """Draw standard exponential numbers of the given shape."""
        return torch.empty(shape).exponential_(generator=self.generator)

    def below(self, end: int, count: int) -> Tensor:
        """Draw `count` whole numbers from 0 to `end` - 1."""
        return torch.randint(end, (count,), generator=self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state as a uint8 tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue the stream from what `state_dict` returned."""
        self.generator.set_state(state["generator"])


class Sampler:
    """How samples are drawn from the policy: with which spread, from which weights, each with noise of its own or not.

    Attributes:
        spread: factor on the noise of a sample: on the sigma of a step, or on the temperature; 1 as it should be.
        shared_noise: whether all samples of a group get the same noise, as after a lost seed.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._stale: nn.Module | None = None
        self.spread, self.shared_noise = 1.0, False

    @property
    def network(self) -> nn.Module:
        """What samples are drawn from: the policy, or what it was when the weights stopped to be copied here."""
        return self._policy if self._stale is None else self._stale

    def go_stale(self) -> None:
        """Sample from the weights of now from now on, as when a weight sync is lost."""
        self._stale = copy.deepcopy(self._policy).requires_grad_(requires_grad=False)

    def follow(self) -> None:
        """Sample from the policy again."""
        self._stale = None

    def noise(self, drawn: Tensor, group_size: int) -> Tensor:
        """Return the noise that the samples get, [..., B, D], for what was drawn for them."""
        if not self.shared_noise:
            return drawn
        firsts = drawn[..., ::group_size, :]
        return firsts.repeat_interleave(group_size, dim=-2)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, with copies of stale weights."""
        stale = None if self._stale is None else {k: v.clone() for k, v in self._stale.state_dict().items()}
        return {"spread": self.spread, "shared_noise": self.shared_noise, "stale": stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.spread, self.shared_noise = state["spread"], state["shared_noise"]
        self._stale = None
        if state["stale"] is not None:
            self.go_stale()
            self.network.load_state_dict(state["stale"])
