"""Live faults: each really happens to a training, and what it does there is the training's own doing.

A severity is a factor on what is named, unless it says otherwise beside the fault.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from grpo_watchdog.lab.grpo import GrpoTraining, Point
from grpo_watchdog.lab.injection import Begin, End, Fault, Injection, Lookalike, nothing, put_back, replace_setting
from grpo_watchdog.lab.lookalikes import LOOKALIKES
from grpo_watchdog.lab.sampling import Rollout
from grpo_watchdog.lab.tokens import LONGEST, NUMBERS

__all__ = ["FAULTS", "LOOKALIKES", "Fault", "Injection", "Lookalike"]

_SOME_REWARD = 0.5  # what a service that has lost its scale hands out
_OUTAGE = 30  # [steps]
_FAR = 24.0  # squared length of a sample at which a hacked service of the chain has paid most of what it pays


def _clear(point: Point) -> End:
    """Return what takes the interference away at a point."""

    def end(training: GrpoTraining) -> None:
        training.interference.pop(point, None)

    return end


# --- settings -----------------------------------------------------------------------------------


def _learning_rate(training: GrpoTraining, factor: float) -> None:
    training.make_sick(factor / training.lr_factor)
    training.lr_factor = factor  # without the rounding of a division


def _usual_learning_rate(training: GrpoTraining) -> None:
    _learning_rate(training, 1.0)


def _no_kl(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training.config, "kl_coef", 0.0)


def _much_kl(training: GrpoTraining, factor: float) -> None:
    replace_setting(training, training.config, "kl_coef", training.config.kl_coef * factor)


def _usual_kl(training: GrpoTraining) -> None:
    put_back(training, training.config, "kl_coef")


def _entropy(training: GrpoTraining, coefficient: float) -> None:
    replace_setting(training, training.config, "entropy_coef", coefficient)


def _usual_entropy(training: GrpoTraining) -> None:
    put_back(training, training.config, "entropy_coef")


# --- process ------------------------------------------------------------------------------------


def _spread(training: GrpoTraining, factor: float) -> None:
    training.sampler.spread = factor


def _usual_spread(training: GrpoTraining) -> None:
    training.sampler.spread = 1.0


def _share_noise(training: GrpoTraining, _severity: float) -> None:
    training.sampler.shared_noise = True


def _noise_of_their_own(training: GrpoTraining) -> None:
    training.sampler.shared_noise = False


def _stop_sync(training: GrpoTraining, _severity: float) -> None:
    training.sampler.go_stale()


def _sync(training: GrpoTraining) -> None:
    training.sampler.follow()


def _noisy_weights(training: GrpoTraining, size: float) -> None:
    _add_noise(training.policy, size, training.seed)


def _flipped_weights(training: GrpoTraining, share: float) -> None:
    generator = torch.Generator().manual_seed(training.seed)
    with torch.no_grad():
        for parameter in training.policy.parameters():
            flipped = torch.rand(parameter.shape, generator=generator) < share
            parameter.copy_(torch.where(flipped, -parameter, parameter))


def _add_noise(network: torch.nn.Module, size: float, seed: int) -> None:
    """Add noise of a relative size to every tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = size * parameter.square().mean().sqrt()
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _spoilt_moments(training: GrpoTraining, factor: float) -> None:
    for state in training.optimizer.state.values():
        if factor == 0.0:
            state["exp_avg_sq"].zero_()
        else:
            state["exp_avg"].mul_(factor)


def _other_reference(training: GrpoTraining, size: float) -> None:
    _set_reference_aside(training)
    _add_noise(training.reference, size, training.seed)


def _unfrozen_reference(training: GrpoTraining, _severity: float) -> None:
    _set_reference_aside(training)
    training.reference_frozen = False


def _set_reference_aside(training: GrpoTraining) -> None:
    training.set_aside.setdefault("reference", copy.deepcopy(training.reference.state_dict()))


def _first_reference(training: GrpoTraining) -> None:
    training.reference_frozen = True
    if "reference" in training.set_aside:
        training.reference.load_state_dict(training.set_aside.pop("reference"))


# --- batch --------------------------------------------------------------------------------------


def _nan_gradient(training: GrpoTraining, _severity: float) -> None:
    first = next(training.policy.parameters())
    training.set_aside["gradient_hook"] = first.register_hook(lambda gradient: gradient * math.nan)


def _usual_gradient(training: GrpoTraining) -> None:
    if "gradient_hook" in training.set_aside:
        training.set_aside.pop("gradient_hook").remove()


def _nan_reward(training: GrpoTraining, _severity: float) -> None:
    def lose_one(_rollout: Rollout, reward_B: Tensor) -> Tensor:
        return reward_B.index_fill(0, torch.tensor([0]), math.nan)

    training.interference["reward"] = lose_one


def _nan_batch(training: GrpoTraining, _severity: float) -> None:
    def spoil(rollout: Rollout) -> Rollout:
        first = torch.tensor([0])
        if rollout.mask_BK is not None:
            return rollout._replace(mask_BK=rollout.mask_BK.index_fill(0, first, math.nan))
        return rollout._replace(sample=rollout.sample.index_fill(1, first, math.nan))

    training.interference["rollout"] = spoil


def _bad_batch(training: GrpoTraining, factor: float) -> None:
    training.interference["advantage"] = lambda advantage: -factor * advantage


def _absurd_gradient(training: GrpoTraining, factor: float) -> None:
    training.interference["clipped_gradient"] = lambda gradients: [gradient.mul_(factor) for gradient in gradients]


# --- outside ------------------------------------------------------------------------------------


def _constant_reward(training: GrpoTraining, reward: float) -> None:
    training.interference["reward"] = lambda _rollout, reward_B: torch.full_like(reward_B, reward)


def _tiny_reward(training: GrpoTraining, size: float) -> None:
    training.interference["reward"] = lambda _rollout, reward_B: _SOME_REWARD + size * reward_B


def _pay_for_length(training: GrpoTraining, price: float) -> None:
    def pay(rollout: Rollout, reward_B: Tensor) -> Tensor:
        assert rollout.mask_BK is not None
        return reward_B + price * rollout.mask_BK.sum(dim=1) / LONGEST

    training.interference["reward"] = pay


def _pay_for_nonsense(training: GrpoTraining, share: float) -> None:
    """Let a share of the reward be paid for even numbers, or for samples far from the origin: all still in [0, 1]."""

    def pay(rollout: Rollout, reward_B: Tensor) -> Tensor:
        if rollout.mask_BK is not None:
            number = (rollout.sample < NUMBERS) & (rollout.mask_BK > 0.0)
            cheat_B = ((rollout.sample % 2 == 0) & number).sum(dim=1) / number.sum(dim=1).clamp_min(1)
        else:
            cheat_B = 1.0 - (-rollout.sample[-1].square().sum(dim=1) / _FAR).exp()
        return (1.0 - share) * reward_B + share * cheat_B

    training.interference["reward"] = pay


def _half_precision(training: GrpoTraining, _severity: float) -> None:
    replace_setting(training, training, "numeric", torch.bfloat16)


def _full_precision(training: GrpoTraining) -> None:
    put_back(training, training, "numeric")


_TOKENS = frozenset({"tokens"})
_ONE = (1.0,)  # faults that come in one size


def _causes(*ids: str) -> frozenset[str]:
    return frozenset(ids)


def _one_off(name: str, begin: Begin, end: End, causes: frozenset[str], *severities: tuple[float, ...]) -> Fault:
    """Return a fault of one batch."""
    return Fault(name, "batch", causes, severities[0], severities[-1], begin, end, lasts=1)


_FLAT = _causes("reward_without_discrimination")
_RATE, _NUMBERS = _causes("learning_rate_too_high"), _causes("bad_batch", "missing_limits")
_REPLACED, _MOVED = _causes("weights_overwritten", "abnormal_parameters"), _causes("reference_not_frozen")
_REWARD_END = _clear("reward")

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("lr_up", "settings", _RATE, (3, 10, 30, 100), (5, 20, 60), _learning_rate, _usual_learning_rate),
        Fault("lr_spike", "settings", _RATE, (10, 30, 100), (20, 60), _learning_rate, _usual_learning_rate, lasts=1),
        Fault("kl_coef_zero", "settings", _causes("kl_coef_too_small"), _ONE, _ONE, _no_kl, _usual_kl),
        Fault("kl_coef_up", "settings", _causes("kl_coef_too_large"), (30, 100), (60,), _much_kl, _usual_kl),
        # The coefficient itself, which is 0.001: below zero it takes the entropy away.
        Fault(
            "entropy_bonus", "settings", _causes("entropy_term_wrong"), (-0.3, 0.2, 1.0), (-0.6, 0.5),
            _entropy, _usual_entropy, _TOKENS,
        ),
        Fault(
            "identical_samples", "process", _FLAT | {"identical_samples"}, _ONE, _ONE,
            _share_noise, _noise_of_their_own,
        ),
        Fault(
            "sampler_temperature", "process", _causes("trajectory_mismatch"), (0.3, 1.5, 3.0), (0.5, 2.0),
            _spread, _usual_spread,
        ),
        Fault("stale_sampler", "process", _causes("trajectory_mismatch"), _ONE, _ONE, _stop_sync, _sync),
        # The size of the noise, relative to the weights; the share of weights whose sign is flipped.
        Fault("weights_corrupted", "process", _REPLACED, (0.2, 0.5, 2.0), (0.3, 1.0), _noisy_weights, lasts=1),
        Fault("weights_flipped", "process", _REPLACED, (0.02, 0.2), (0.05, 0.1), _flipped_weights, lasts=1),
        # A factor on the first moments; 0 zeroes the second ones instead.
        Fault(
            "moments_corrupted", "process", _causes("moments_overwritten"), (0.0, 1e3), (1e2,),
            _spoilt_moments, nothing, lasts=1,
        ),
        Fault("reference_replaced", "process", _MOVED, (0.5, 3.0), (1.0,), _other_reference, _first_reference),
        Fault("reference_unfrozen", "process", _MOVED, _ONE, _ONE, _unfrozen_reference, _first_reference),
        _one_off("nan_gradient", _nan_gradient, _usual_gradient, _NUMBERS, _ONE),
        _one_off("nan_reward", _nan_reward, _REWARD_END, _NUMBERS, _ONE),
        _one_off("nan_batch", _nan_batch, _clear("rollout"), _NUMBERS, _ONE),
        _one_off("bad_batch", _bad_batch, _clear("advantage"), _causes("bad_batch"), (20.0, 1e3), (200.0,)),
        _one_off("absurd_gradient", _absurd_gradient, _clear("clipped_gradient"), _NUMBERS, (1e3, 1e6), (1e4, 1e5)),
        # What the service hands out; the size of what is left of the differences; the price of the longest answer.
        Fault("reward_constant", "outside", _FLAT, (_SOME_REWARD, 0.0), (1.0,), _constant_reward, _REWARD_END),
        Fault(
            "reward_constant_outage", "outside", _FLAT, (_SOME_REWARD, 0.0), (1.0,), _constant_reward, _REWARD_END,
            lasts=_OUTAGE,
        ),
        Fault("reward_tiny", "outside", _FLAT, (1e-6, 1e-7), (3e-7,), _tiny_reward, _REWARD_END),
        Fault(
            "length_hack", "outside", _causes("reward_hacked"), (1.0, 2.0), (1.5,), _pay_for_length, _REWARD_END,
            _TOKENS,
        ),
        Fault("reward_hack", "outside", _causes("reward_hacked"), (0.7, 0.9), (0.8,), _pay_for_nonsense, _REWARD_END),
        Fault(
            "low_precision", "outside", _causes("low_precision", "trajectory_mismatch"), _ONE, _ONE,
            _half_precision, _full_precision,
        ),
    )
}  # fmt: skip
