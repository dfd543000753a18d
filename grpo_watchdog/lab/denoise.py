"""A real GRPO training of a chain of Gaussian denoising steps, small enough for one CPU core.

This is the setting of the documented incident, shrunk: the policy draws `x_T ~ N(0, I)` and then
`x_{t-1} ~ N(mean_theta(x_t, t, prompt), sigma^2 I)`; a trajectory's log-prob is summed over all dimensions and steps;
the surrogate ratio is taken to the frozen *reference*, not to the old policy. Gradients, sampling and the ruin after
`DenoiseTraining.make_sick` are real: nothing is scripted. Bit-deterministic for a seed with one thread.

Shapes by suffix: P prompts, G samples per prompt, B = P * G, T denoising steps, D dims, C prompt dims; a trailing 1
is an axis kept for broadcasting.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

_LOG_RATIO_CLAMP = 20.0  # [nats], the document's clamp; the incident's mean_ratio is exp(20)
_ADVANTAGE_EPS = 1e-4  # a group of equal rewards gets advantage 0 instead of 0 / 0
_ZERO_STD = 1e-6  # a group whose rewards spread less than this carries no signal
_REWARD_SEED = 7  # the reward is the task's, so it is the same for every training seed
_EVALUATION_SEED = 20_240_229  # every evaluation sees the same prompts and the same noise


@dataclass
class DenoiseConfig:
    """Settings of a denoising run; mutable on purpose: the trainer reads its knobs on every step.

    The logged `kl_penalty` is always k1, the mean of (log-prob current - reference); `kl_gradient` only chooses
    whose gradient the penalty has. The default is the document's own, k1: it trains well here, although its gradient
    is zero in expectation, noise that grows with `kl_coef` and restrains nothing. k2, log_ratio^2 / 2, does pull
    towards the reference.
    """

    learning_rate: float = 2.5e-3  # peak, before the schedule
    kl_coef: float = 0.1  # weight of the KL penalty (TRL: beta); read on every step
    clip_epsilon: float = 0.2  # half-width of the surrogate's clip range; read on every step
    group_size: int = 16  # samples per prompt, G, over which advantages are normalised
    prompts: int = 24  # prompts per step, P
    dims: int = 10  # dimensions of a sample, D, at least 2
    prompt_dims: int = 4  # dimensions of a prompt's condition vector, C
    denoise_steps: int = 20  # length of the chain, T [steps]
    hidden: int = 32  # width of the mean network's two hidden layers
    sigma: float = 0.41  # standard deviation of one denoising step's noise, below 1
    total_steps: int = 300  # length of the learning-rate schedule [steps]
    warmup_steps: int = 20  # its linear warm-up, at least 1 [steps]; shorter ones overshoot the ratio's range
    final_lr_fraction: float = 0.05  # learning rate at the schedule's end, as a fraction of the peak
    max_grad_norm: float | None = 1.0  # gradient-norm clip, None for none
    kl_gradient: Literal["k1", "k2"] = "k1"  # estimator whose gradient the KL penalty has


class DenoiseSampler:
    """The one source of a training's randomness: prompts, starting points and step noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers of the given shape."""
        return torch.randn(shape, generator=self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state as a uint8 tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the stream from what `state_dict` returned."""
        self.generator.set_state(state["generator"])


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
    turn = 0.3  # how far a typical prompt turns the direction [radians, about]

    def __init__(self, config: DenoiseConfig) -> None:
        generator = torch.Generator().manual_seed(_REWARD_SEED)
        self.base_D = nn.functional.normalize(torch.randn(config.dims, generator=generator), dim=0)
        turn_CD = torch.randn(config.prompt_dims, config.dims, generator=generator)
        self.turn_CD = turn_CD * self.turn / math.sqrt(config.prompt_dims * config.dims)

    def __call__(self, x0_BD: Tensor, prompt_BC: Tensor) -> Tensor:
        """Return one reward per sample, [B]."""
        aim_BD = nn.functional.normalize(self.base_D + prompt_BC @ self.turn_CD, dim=-1)
        depth_B1 = (x0_BD * aim_BD).sum(dim=-1, keepdim=True)
        miss_B = ((depth_B1 - self.centre) / self.half_width).squeeze(-1)
        stray_B = (x0_BD - depth_B1 * aim_BD).norm(dim=-1) / (self.spread * math.sqrt(x0_BD.shape[-1] - 1))
        return torch.exp(-(miss_B**self.power) - stray_B**self.power)


class DenoiseTraining:
    """GRPO on the denoising chain: policy, frozen reference, AdamW, warm-up and cosine decay."""

    def __init__(self, config: DenoiseConfig | None = None, *, seed: int) -> None:
        self.config = DenoiseConfig() if config is None else config
        with torch.random.fork_rng(devices=[]):  # leaves the caller's global stream alone
            torch.manual_seed(seed)
            self.policy: nn.Module = MeanNetwork(self.config)
        self.reference: nn.Module = copy.deepcopy(self.policy).eval().requires_grad_(requires_grad=False)
        # No weight decay: it would pull towards zero, not towards the reference.
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
        self._lr_factor = 1.0
        self._reward_lost = False
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._schedule)
        self.sampler = DenoiseSampler(seed)
        self.reward = WindowReward(self.config)

    def train_one_step(self) -> dict[str, float | Tensor]:
        """Sample, learn and step the scheduler once.

        Returns:
            Canonical metrics, tensors 0-d and detached; log-probs are summed over the trajectory [nats]. `loss` is
            exactly `policy_loss + kl_coef * kl_penalty` in float64, the identity of the incident's figures.
        """
        config = self.config
        kl_coef, clip_epsilon = config.kl_coef, config.clip_epsilon
        path_TBD, prompt_BC, reward_B = self._rollout(self.sampler, config.prompts, config.group_size)
        if self._reward_lost:
            reward_B[0], self._reward_lost = math.nan, False
        reward_PG = reward_B.double().view(config.prompts, config.group_size)
        std_P1 = reward_PG.std(dim=1, keepdim=True)
        advantage_B = ((reward_PG - reward_PG.mean(dim=1, keepdim=True)) / (std_P1 + _ADVANTAGE_EPS)).flatten()
        current_B = self._log_prob(self.policy, path_TBD, prompt_BC)
        with torch.no_grad():
            ref_B = self._log_prob(self.reference, path_TBD, prompt_BC)
        log_ratio_B = current_B - ref_B
        ratio_B = log_ratio_B.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP).exp()
        bounded_B = ratio_B.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
        policy_loss = -torch.minimum(ratio_B * advantage_B, bounded_B * advantage_B).mean()
        kl_penalty = log_ratio_B.mean()
        restraint = kl_penalty if config.kl_gradient == "k1" else 0.5 * log_ratio_B.square().mean()
        grad_norm = self._learn(policy_loss + kl_coef * restraint)

        # Clipped as TRL counts it: only where the clip takes the gradient away.
        clipped_B = torch.where(advantage_B < 0.0, ratio_B < 1.0 - clip_epsilon, ratio_B > 1.0 + clip_epsilon)
        metrics = {
            "loss": policy_loss + kl_coef * kl_penalty,
            "policy_loss": policy_loss,
            "kl_penalty": kl_penalty,
            "mean_ratio": ratio_B.mean(),
            "mean_advantage": advantage_B.mean(),
            "mean_log_prob_current": current_B.mean(),
            "mean_log_prob_ref": ref_B.mean(),
            "mean_reward": reward_PG.mean(),
            "std_reward": reward_PG.std(),
            "log_ratio": kl_penalty,
            "max_abs_log_ratio": log_ratio_B.abs().max(),
            "std_advantage": advantage_B.std(),
            "zero_std_fraction": (std_P1 < _ZERO_STD).double().mean(),
            "clip_fraction": clipped_B.double().mean(),
            "grad_norm": grad_norm,
        }
        detached = {name: value.detach() for name, value in metrics.items()}
        return {**detached, "kl_coef": kl_coef, "clip_epsilon": clip_epsilon}

    def true_reward(self, samples: int = 4096) -> float:
        """Return the policy's mean reward over fresh prompts; a sample that is NaN scores 0.

        Its generator is its own and fixed: training randomness is untouched, and policies meet the same noise.
        """
        _, _, reward_B = self._rollout(DenoiseSampler(_EVALUATION_SEED), samples, 1)
        return float(reward_B.nan_to_num(nan=0.0).mean())

    def make_sick(self, lr_factor: float) -> None:
        """Multiply the learning rate from now on, as a mistaken hot-reload of the settings would.

        The factor sits in the schedule function, which no state dict carries: restoring a checkpoint does not cure
        the cause, as in a real run.
        """
        self._lr_factor *= lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] *= lr_factor

    def lose_a_reward(self) -> None:
        """Let one sample of the next batch come back without a reward (NaN), as when a reward service fails once."""
        self._reward_lost = True

    def _schedule(self, step: int) -> float:
        """Return the learning rate at a step as a multiple of the peak."""
        config = self.config
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / config.total_steps)))
        floor = config.final_lr_fraction
        return self._lr_factor * warmup * (floor + (1.0 - floor) * cosine)

    @torch.no_grad()
    def _rollout(self, sampler: DenoiseSampler, prompts: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample trajectories: paths [T+1, B, D] from x_T to x_0, prompts [B, C], rewards [B]."""
        config = self.config
        prompt_PC = sampler.normal(prompts, config.prompt_dims)
        prompt_BC = prompt_PC.repeat_interleave(group_size, dim=0)
        x_BD = sampler.normal(prompts * group_size, config.dims)
        path = [x_BD]
        for t in range(config.denoise_steps, 0, -1):
            mean_BD = self.policy(x_BD, torch.full_like(x_BD[:, :1], t), prompt_BC)
            x_BD = mean_BD + config.sigma * sampler.normal(*x_BD.shape)
            path.append(x_BD)
        return torch.stack(path), prompt_BC, self.reward(x_BD, prompt_BC)

    def _log_prob(self, network: nn.Module, path_TBD: Tensor, prompt_BC: Tensor) -> Tensor:
        """Return each trajectory's log-prob under a network, summed over steps and dims, [B] [nats]."""
        sigma, steps = self.config.sigma, self.config.denoise_steps
        t_T11 = torch.arange(steps, 0, -1, dtype=path_TBD.dtype).view(-1, 1, 1)
        t_TB1 = t_T11.expand(-1, prompt_BC.shape[0], -1)
        mean_TBD: Tensor = network(path_TBD[:-1], t_TB1, prompt_BC.expand(steps, -1, -1))
        noise_TBD = ((path_TBD[1:] - mean_TBD) / sigma).double()  # the ratio is a small difference of two large sums
        constant = steps * self.config.dims * math.log(sigma * math.sqrt(2.0 * math.pi))
        return -0.5 * noise_TBD.square().sum(dim=(0, 2)) - constant

    def _learn(self, objective: Tensor) -> Tensor:
        """Descend the objective by one optimizer and scheduler step; return the gradient norm."""
        self.optimizer.zero_grad()
        objective.backward()
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        self.optimizer.step()
        self.scheduler.step()
        return grad_norm
