"""What the lab's real GRPO trainings share: one step, its metrics, its state, and the places where a fault can sit.

Nothing is scripted: a fault changes a setting, a state, a batch or the reward service, and what follows is the
training's own doing. All randomness comes from the seed, by generators of its own, and every step draws the same amount
of it whatever happened before: runs of one seed meet the same prompts and the same noise.

Shapes by suffix: P prompts, G samples per prompt, B = P * G, K what a sample consists of (denoising steps or tokens); a
trailing 1 is an axis kept for broadcasting.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import grpo_watchdog as gw
from grpo_watchdog.lab.objective import LOG_RATIO_CLAMP, GrpoConfig, Score, mean_over, surrogate
from grpo_watchdog.lab.sampling import Rollout, Sampler, Stream
from grpo_watchdog.metrics import RatioTo

_ADVANTAGE_EPS = 1e-4  # a group of equal rewards gets advantage 0 instead of 0 / 0
_ZERO_STD = 1e-6  # a group whose rewards spread less than this carries no signal
_EVALUATION_SEED = 20_240_229  # every evaluation sees the same prompts and the same noise

Point = Literal["rollout", "reward", "advantage", "gradient", "clipped_gradient"]


class GrpoTraining(abc.ABC):
    """GRPO on one task: policy, frozen reference, AdamW, warm-up and cosine decay.

    Args:
        config: its settings.
        seed: of everything that is random in it.
        task: its name.

    Attributes:
        stream: where prompts and noise come from: what decides which data comes next.
        sampler: how samples are drawn: state of the process, which a rollback brings back.
        interference: what a fault does at a point of the step, by point: it takes a value and returns another; for
            "reward" it takes the rollout too.
        set_aside: what a fault replaced, by name, until it ends.
        lr_factor: what the schedule is multiplied by. It sits in the schedule function, which no state dict carries.
        restarted_at: step at which the learning rate's warm-up began last [steps].
        numeric: type that the trainer's log-probs are computed in.
        reference_frozen: whether the reference stays; otherwise it follows the policy.
    """

    def __init__(self, config: GrpoConfig, *, seed: int, task: str) -> None:
        self._settings, self.seed, self.task = config, seed, task
        with torch.random.fork_rng(devices=[]):  # leaves the caller's global stream alone
            torch.manual_seed(seed)
            self.policy: nn.Module = self._network()
        self.reference: nn.Module = copy.deepcopy(self.policy).eval().requires_grad_(requires_grad=False)
        # No weight decay: it would pull towards zero, not towards the reference.
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, weight_decay=0.0, foreach=True
        )
        self.lr_factor, self.restarted_at = 1.0, 0
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._schedule)
        self.stream, self.sampler = Stream(seed), Sampler(self.policy)
        self.interference: dict[Point, Callable[..., Any]] = {}
        self.set_aside: dict[str, Any] = {}
        self.numeric, self.reference_frozen = torch.float64, True
        self._reward_lost = False

    @property
    def config(self) -> GrpoConfig:
        """The settings, read on every step."""
        return self._settings

    @property
    def steps(self) -> int:
        """How many steps a whole run has [steps]."""
        return self._settings.total_steps

    @property
    def ratio_to(self) -> RatioTo:
        """The policy that the surrogate ratio is taken to."""
        return self._settings.ratio_to

    @abc.abstractmethod
    def _network(self) -> nn.Module:
        """Build an untrained policy from the global random stream."""

    @abc.abstractmethod
    def _roll_out(self, stream: Stream, sampler: Sampler, prompts: int, group_size: int) -> Rollout:
        """Sample `group_size` times for each of `prompts` prompts."""

    @abc.abstractmethod
    def _score(self, network: nn.Module, rollout: Rollout) -> Score:
        """Return the log-probs of a rollout under a network, computed in `self.numeric`."""

    @abc.abstractmethod
    def _mark(self, rollout: Rollout) -> Tensor:
        """Return how good each sample is, in [0, 1], [B]."""

    def judge(self, rollout: Rollout) -> Tensor:
        """Return the true reward of each sample, in [0, 1], [B]."""
        mark_B, enough = self._mark(rollout), self._settings.pass_mark
        return mark_B if enough is None else (mark_B >= enough).to(mark_B.dtype)

    def _per_unit(self, score: Score) -> Score:
        """Return the score of what a ratio is taken of; the whole trajectory where not overridden."""
        return score._replace(log_prob_BK=score.log_prob_BK.sum(dim=1, keepdim=True))

    def _about(self, _rollout: Rollout) -> dict[str, Tensor]:
        """Return metrics that only this task has."""
        return {}

    def train_one_step(self) -> dict[str, float | Tensor]:
        """Sample, learn and step the scheduler once.

        Returns:
            Canonical metrics, tensors 0-d and detached. With the ratio to the reference, `loss` is exactly
            `policy_loss + kl_coef * kl_penalty`, the identity of the incident's figures; with the ratio to the old
            policy it is `policy_loss + kl_coef * kl - entropy_coef * entropy`, all in float64. `step_kl` and `ess`
            tell of the update just made, `step_kl` as KL(old || new), which samples of the old one estimate.
        """
        config = self._settings
        if not self.reference_frozen:
            self.reference.load_state_dict(self.policy.state_dict())
        with torch.no_grad():
            rollout = self._through(
                "rollout", self._roll_out(self.stream, self.sampler, config.prompts, config.group_size)
            )
        reward_PG = self._reward(rollout)
        std_P1 = reward_PG.std(dim=1, keepdim=True)
        advantage_PG = (reward_PG - reward_PG.mean(dim=1, keepdim=True)) / (std_P1 + _ADVANTAGE_EPS)
        advantage_B1 = self._through("advantage", advantage_PG).flatten().unsqueeze(1)
        current = self._score(self.policy, rollout)
        with torch.no_grad():
            reference = self._score(self.reference, rollout)
        loss = surrogate(config, advantage_B1, self._per_unit(current), self._per_unit(reference), rollout.mask_BK)
        grad_norm = self._learn(loss.objective)
        metrics = {
            **loss.metrics,
            "mean_advantage": advantage_B1.mean(),
            "std_advantage": advantage_B1.std(),
            "mean_reward": reward_PG.mean(),
            "std_reward": reward_PG.std(),
            "zero_std_fraction": (std_P1 < _ZERO_STD).double().mean(),
            "grad_norm": grad_norm,
        }
        if config.ratio_to == "old":
            metrics |= {
                "mean_abs_advantage": advantage_B1.abs().mean(),
                "group_std_reward": std_P1.mean(),
                **self._about(rollout),
                **self._after(rollout, current.log_prob_BK.detach()),
            }
        detached = {name: value.detach() for name, value in metrics.items()}
        return {**detached, "kl_coef": config.kl_coef, "clip_epsilon": config.clip_epsilon}

    def true_reward(self, samples: int = 4096) -> float:
        """Return the policy's mean true reward over fresh prompts; a sample that is NaN scores 0.

        Its generator is its own and fixed, and its sampler is as it should be: training randomness is untouched,
        policies meet the same noise, and no fault of the reward service or of the sampler shows in it.
        """
        with torch.no_grad():
            rollout = self._roll_out(Stream(_EVALUATION_SEED), Sampler(self.policy), samples, 1)
            lost_B = rollout.log_prob_BK.isnan().any(dim=1)
            return float(self.judge(rollout).nan_to_num(nan=0.0).masked_fill(lost_B, 0.0).mean())

    def make_sick(self, lr_factor: float) -> None:
        """Multiply the learning rate from now on, as a mistaken hot-reload of the settings would.

        The factor sits in the schedule function, which no state dict carries: restoring a checkpoint does not cure
        the cause, as in a real run.
        """
        self.lr_factor *= lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] *= lr_factor

    def lose_a_reward(self) -> None:
        """Let one sample of the next batch come back without a reward (NaN), as when a reward service fails once."""
        self._reward_lost = True

    def handed_over(self) -> dict[str, Any]:
        """Return what a rollback must bring back beside the model, the optimizer and the scheduler, by name."""
        return {
            "sampler": self.sampler,
            "reference_weights": self.reference,
            "reference_frozen": (lambda: self.reference_frozen, lambda value: setattr(self, "reference_frozen", value)),
            "entropy_coef": (
                lambda: self._settings.entropy_coef,
                lambda value: setattr(self._settings, "entropy_coef", value),
            ),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the whole state of the training, the settings left out."""
        return copy.deepcopy({name: owner.state_dict() for name, owner in self._owners().items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, owner in self._owners().items():
            owner.load_state_dict(copy.deepcopy(state[name]))

    def _owners(self) -> dict[str, Any]:
        names = ("policy", "reference", "optimizer", "scheduler", "sampler", "stream")
        return {name: getattr(self, name) for name in names}

    def attach(self, run_dir: str | Path | None, **options: Any) -> gw.Watchdog:
        """Attach a watchdog to this training; options go to `gw.attach`, and replace what is handed over here."""
        given: Mapping[str, Any] = {
            "model": self.policy,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "reference": self.reference,
            "kl_coef": gw.attr(self._settings, "kl_coef"),
            "clip_epsilon": gw.attr(self._settings, "clip_epsilon"),
            "ratio_to": self.ratio_to,
            "state": self.handed_over(),
            "data": {"stream": self.stream},
            "run_dir": run_dir,
        }
        return gw.attach(**{**given, **options})

    def _schedule(self, step: int) -> float:
        """Return the learning rate at a step as a multiple of the peak."""
        config = self._settings
        since = step - self.restarted_at if step >= self.restarted_at else step
        warmup = min(1.0, (since + 1) / config.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / config.total_steps)))
        floor = config.final_lr_fraction
        return self.lr_factor * warmup * (floor + (1.0 - floor) * cosine)

    def _through(self, point: Point, value: Any) -> Any:  # noqa: ANN401 - each point has a type of its own
        interfere = self.interference.get(point)
        return value if interfere is None else interfere(value)

    def _reward(self, rollout: Rollout) -> Tensor:
        """Ask the reward service: [P, G]."""
        with torch.no_grad():
            reward_B = self.judge(rollout)
            interfere = self.interference.get("reward")
            if interfere is not None:
                reward_B = interfere(rollout, reward_B)
        if self._reward_lost:
            reward_B[0], self._reward_lost = math.nan, False
        return reward_B.double().view(-1, self._settings.group_size)

    def _learn(self, objective: Tensor) -> Tensor:
        """Descend the objective by one optimizer and scheduler step; return the gradient norm."""
        self.optimizer.zero_grad()
        objective.backward()
        gradients = self._through("gradient", [p.grad for p in self.policy.parameters()])
        limit = math.inf if self._settings.max_grad_norm is None else self._settings.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), limit, foreach=True)
        self._through("clipped_gradient", gradients)
        self.optimizer.step()
        self.scheduler.step()
        return grad_norm

    @torch.no_grad()
    def _after(self, rollout: Rollout, old_BK: Tensor) -> dict[str, Tensor]:
        """Compare the policy after the update with the one before it, and that one with the sampler."""
        change_B = (self._score(self.policy, rollout).log_prob_BK - old_BK).sum(dim=1)
        weight_B = (change_B - change_B.max()).exp()  # ess does not mind a common factor
        step_kl = (change_B.clamp(max=LOG_RATIO_CLAMP).exp() - 1.0 - change_B).mean()
        ess = weight_B.sum().square() / (weight_B.square().sum() * weight_B.numel())
        mismatch = mean_over((old_BK - rollout.log_prob_BK).abs(), rollout.mask_BK) / rollout.dims
        return {"step_kl": step_kl, "ess": ess, "sampler_mismatch": mismatch}
