"""A chain of Gaussian denoising steps, trained by GRPO, small enough for one CPU core.

This is the setting of the documented incident, shrunk: the policy draws `x_T ~ N(0, I)` and then
`x_{t-1} ~ N(mean_theta(x_t, t, prompt), sigma^2 I)`; a trajectory's log-prob is summed over all dimensions and steps.
As in the document the surrogate ratio is taken to the frozen *reference*; with `ratio_to="old"` it is taken to the old
policy, and a KL penalty that does restrain holds the policy to the reference, as in Flow-GRPO.

Shapes by suffix, beside those of `grpo`: T denoising steps, D dims, C prompt dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grpo_watchdog.lab.grpo import GrpoTraining
from grpo_watchdog.lab.objective import GrpoConfig, Score
from grpo_watchdog.lab.sampling import Rollout, Sampler, Stream
from grpo_watchdog.metrics import RatioTo

_REWARD_SEED = 7  # the reward is the task's, so it is the same for every training seed


@dataclass(kw_only=True)
class DenoiseConfig(GrpoConfig):
    """Settings of a denoising run.

    The default is the document's own, with the gradient of k1: it trains well here, although that gradient is zero in
    expectation, noise that grows with `kl_coef` and restrains nothing. k2 does pull towards the reference.
    """

    learning_rate: float = 2.5e-3
    kl_coef: float = 0.1
    kl_gradient: Literal["k1", "k2", "k3"] = "k1"
    group_size: int = 16
    prompts: int = 24
    total_steps: int = 300
    ratio_to: RatioTo = "reference"
    dims: int = 10  # dimensions of a sample, D, at least 2
    prompt_dims: int = 4  # dimensions of a prompt's condition vector, C
    denoise_steps: int = 20  # length of the chain, T [steps]
    hidden: int = 32  # width of the mean network's two hidden layers
    sigma: float = 0.41  # standard deviation of one denoising step's noise, below 1
    turn: float = 0.3  # how far a typical prompt turns the direction that is rewarded [radians, about]


class MeanNetwork(nn.Module):
    """The mean of one denoising step: x_t contracted, plus a learned shift in units of sigma."""

    def __init__(self, config: DenoiseConfig) -> None:
        """Build it with a small last layer, so that the untrained chain stays near N(0, I)."""
        super().__init__()
        self.sigma = config.sigma
        self.decay = math.sqrt(1.0 - config.sigma**2)  # keeps the variance of x at 1 along the chain
        self.steps = config.denoise_steps
        last = nn.Linear(config.hidden, config.dims)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
        self.shift = nn.Sequential(
            nn.Linear(config.dims + config.prompt_dims + 1, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),  # bounds the shift: ruin is thousands of nats, where SiLU would feed on itself and overflow
            last,
        )

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """Return the means of x_{t-1}, [..., D], given x_t [..., D], t [..., 1], prompt [..., C]."""
        time = 2.0 * t / self.steps - 1.0
        shift: Tensor = self.shift(torch.cat([x, time, prompt], dim=-1))
        return self.decay * x + self.sigma * shift


class WindowReward:
    """A reward in [0, 1]: does x_0 lie in a window along its prompt's direction, and near it elsewhere?

    The window spans about 0.5 to 3.1 standard deviations of the untrained x_0, so about 0.3 of its samples score;
    about 0.3 nats of KL nearly double that. A policy that is blown away, in whichever direction, scores 0.
    """

    centre = 1.81  # [standard deviations of the untrained x_0]
    half_width = 1.335  # [the same]; the reward falls to 1/e here
    spread = 2.0  # [the same], root mean square over the other directions: about 1 untrained, and free until here
    power = 8  # steep edges: steering pays only near them, which keeps the needed KL small

    def __init__(self, config: DenoiseConfig) -> None:
        generator = torch.Generator().manual_seed(_REWARD_SEED)
        self.base_D = nn.functional.normalize(torch.randn(config.dims, generator=generator), dim=0)
        turn_CD = torch.randn(config.prompt_dims, config.dims, generator=generator)
        self.turn_CD = turn_CD * config.turn / math.sqrt(config.prompt_dims * config.dims)

    def __call__(self, x0_BD: Tensor, prompt_BC: Tensor) -> Tensor:
        """Return one reward per sample, [B]."""
        aim_BD = nn.functional.normalize(self.base_D + prompt_BC @ self.turn_CD, dim=-1)
        depth_B1 = (x0_BD * aim_BD).sum(dim=-1, keepdim=True)
        miss_B = ((depth_B1 - self.centre) / self.half_width).squeeze(-1)
        stray_B = (x0_BD - depth_B1 * aim_BD).norm(dim=-1) / (self.spread * math.sqrt(x0_BD.shape[-1] - 1))
        return torch.exp(-(miss_B**self.power) - stray_B**self.power)


class DenoiseTraining(GrpoTraining):
    """GRPO on the denoising chain."""

    def __init__(self, config: DenoiseConfig | None = None, *, seed: int, task: str = "reference") -> None:
        self._denoise = DenoiseConfig() if config is None else config
        self.reward = WindowReward(self._denoise)
        super().__init__(self._denoise, seed=seed, task=task)

    @property
    def config(self) -> DenoiseConfig:
        """The settings, read on every step."""
        return self._denoise

    def _network(self) -> nn.Module:
        return MeanNetwork(self._denoise)

    def _mark(self, rollout: Rollout) -> Tensor:
        return self.reward(rollout.sample[-1], rollout.prompt)

    def _roll_out(self, stream: Stream, sampler: Sampler, prompts: int, group_size: int) -> Rollout:
        config = self._denoise
        network, sigma = sampler.network, config.sigma * sampler.spread
        prompt_BC = stream.normal(prompts, config.prompt_dims).repeat_interleave(group_size, dim=0)
        x_BD = sampler.noise(stream.normal(prompts * group_size, config.dims), group_size)
        path, noises = [x_BD], []
        for t in range(config.denoise_steps, 0, -1):
            noise_BD = sampler.noise(stream.normal(*x_BD.shape), group_size)
            x_BD = network(x_BD, torch.full_like(x_BD[:, :1], t), prompt_BC) + sigma * noise_BD
            path.append(x_BD)
            noises.append(noise_BD)
        log_prob_TB = -0.5 * torch.stack(noises).double().square().sum(dim=2) - self._constant(sigma)
        return Rollout(prompt_BC, torch.stack(path), log_prob_TB.T, dims=config.dims)

    def _score(self, network: nn.Module, rollout: Rollout) -> Score:
        sigma, steps, path_TBD = self._denoise.sigma, self._denoise.denoise_steps, rollout.sample
        t_T11 = torch.arange(steps, 0, -1, dtype=path_TBD.dtype).view(-1, 1, 1)
        t_TB1 = t_T11.expand(-1, path_TBD.shape[1], -1)
        mean_TBD: Tensor = network(path_TBD[:-1], t_TB1, rollout.prompt.expand(steps, -1, -1))
        # In float64, because the ratio is a small difference of two large sums.
        noise_TBD = ((path_TBD[1:] - mean_TBD) / sigma).to(self.numeric)
        log_prob_TB = -0.5 * noise_TBD.square().sum(dim=2) - self._constant(sigma)
        return Score(log_prob_TB.double().T)

    def _constant(self, sigma: float) -> float:
        """Return the log of the normalisation of one denoising step [nats]."""
        return self._denoise.dims * math.log(sigma * math.sqrt(2.0 * math.pi))


# The chain shrunk until a run takes about a second; it still learns when half of the run is over.
_SMALL: dict[str, Any] = {
    "dims": 6,
    "prompts": 12,
    "group_size": 8,
    "total_steps": 200,
    "learning_rate": 3e-3,
}


def reference_task(seed: int) -> DenoiseTraining:
    """Return the document's kind of trainer: ratio to the frozen reference, k1 penalty."""
    return DenoiseTraining(
        DenoiseConfig(**_SMALL, denoise_steps=12, final_lr_fraction=0.1), seed=seed, task="reference"
    )


def chain_task(seed: int) -> DenoiseTraining:
    """Return the Flow-GRPO kind of trainer: ratio to the old policy, KL to the reference in the gradient."""
    # The direction turns with the prompt, or a policy would hit it again within a few steps whatever befell it.
    config = DenoiseConfig(
        **_SMALL,
        denoise_steps=8,
        final_lr_fraction=0.5,
        turn=2.0,
        ratio_to="old",
        kl_gradient="k2",
        kl_coef=0.03,
    )
    return DenoiseTraining(config, seed=seed, task="chain")
