"""What a GRPO step's tensors come to: pure functions from tensors to sums on the device, and from sums to metrics.

Everything stays on the device until `metrics` is given the numbers: all sums and maxima of a step travel to the host
together. Shapes: B completions, T tokens, N completions of a generation batch, F reward functions, G a group's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_TINY_STD = 1e-8  # torch.isclose to 0, as the trainer tells that a group's rewards are equal


class Tally(NamedTuple):
    """Sums and maxima over what was seen, by name; 0-d float32 tensors."""

    sums: dict[str, torch.Tensor]
    peaks: dict[str, torch.Tensor]

    def plus(self, other: Tally) -> Tally:
        """Return both together: micro-batches of one optimizer step."""
        sums = {n: self.sums[n] + s if n in self.sums else s for n, s in other.sums.items()}
        peaks = {n: torch.maximum(self.peaks[n], p) if n in self.peaks else p for n, p in other.peaks.items()}
        return Tally({**self.sums, **sums}, {**self.peaks, **peaks})


class Surrogate(NamedTuple):
    """How the trainer forms its ratio and clips it.

    Attributes:
        sequence: one ratio a sequence (GSPO: exp of the mean over its tokens), not one a token.
        low: the ratio is clipped below 1 - low.
        high: and above 1 + high.
        clips: whether the loss has such a clip.
    """

    sequence: bool
    low: float
    high: float
    clips: bool


def token_tally(
    inputs: Mapping[str, Any], logp_BT: torch.Tensor, entropy_BT: torch.Tensor | None, surrogate: Surrogate
) -> Tally:
    """Return what one micro-batch adds to a step.

    Args:
        inputs: what the trainer's loss is computed from: completion_mask, advantages and, where they exist, tool_mask,
            old_per_token_logps, ref_per_token_logps and sampling_per_token_logps.
        logp_BT: log-probs of the completions' tokens under the policy [nats].
        entropy_BT: entropy at each of them [nats].
        surrogate: how the ratio is formed.
    """
    mask_BT = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask_BT = mask_BT * inputs["tool_mask"]
    here_BT = mask_BT.bool()
    logp_BT = _only(logp_BT, here_BT)
    sums = {"tokens": here_BT.sum(), "sequences": logp_BT.new_tensor(float(len(logp_BT))), "logp": logp_BT.sum()}
    peaks: dict[str, torch.Tensor] = {}
    if entropy_BT is not None:
        sums["entropy"] = _only(entropy_BT, here_BT).sum()
    _add_advantages(sums, inputs["advantages"], here_BT)
    old_BT = inputs.get("old_per_token_logps")
    if old_BT is not None:
        _add_ratio(sums, peaks, logp_BT - _only(old_BT, here_BT), here_BT, surrogate)
    ref_BT = inputs.get("ref_per_token_logps")
    if ref_BT is not None:
        ref_BT = _only(ref_BT, here_BT)
        behind_BT = ref_BT - logp_BT
        sums |= {
            "ref_logp": ref_BT.sum(),
            "behind": behind_BT.sum(),  # by itself: of two large sums that nearly cancel, rounding would be left
            "kl_k2": (behind_BT.square() / 2).sum(),
            "kl_k3": (behind_BT.exp() - behind_BT - 1).sum(),
        }
    sampler_BT = inputs.get("sampling_per_token_logps")
    if sampler_BT is not None:
        known_BT = here_BT & ~sampler_BT.isnan()  # an engine could not score the others
        trained_BT = logp_BT if old_BT is None else _only(old_BT, here_BT)
        apart_BT = _only(trained_BT - sampler_BT, known_BT)  # no indexing by a mask: its size would have to be fetched
        sums |= {"mismatch": apart_BT.abs().sum(), "scored": known_BT.sum()}
    return Tally({n: s.float() for n, s in sums.items()}, peaks)


def reward_stats(rewards_NF: torch.Tensor, weights_F: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """Return the reward metrics of one generation batch, as the trainer weighs and groups it.

    Args:
        rewards_NF: what each reward function gave each completion, groups one after the other; NaN: it gave none.
        weights_F: the weight of each function.
        group: completions of one prompt.
    """
    rewards_N = (rewards_NF * weights_F.to(rewards_NF)).nansum(dim=1).float()
    rewards_N[rewards_NF.isnan().all(dim=1)] = torch.nan
    groups = rewards_N.view(-1, group)
    spread = _nanstd(groups)
    told = ~spread.isnan()
    count = told.sum().clamp(min=1)
    return {
        "mean_reward": rewards_N.nanmean(),
        "std_reward": _nanstd(rewards_N.unsqueeze(0))[0],
        "group_std_reward": spread.nan_to_num(0.0).sum() / count,
        "zero_std_fraction": (told & (spread <= _TINY_STD)).sum() / count,
    }


def metrics(sums: Mapping[str, float], peaks: Mapping[str, float]) -> dict[str, float]:
    """Return the canonical metrics of one optimizer step from its sums and maxima.

    Means are over all tokens of the step, those of the ratio over all ratios, those of sequences over all sequences.
    """
    if not sums["tokens"]:  # all of it is masked: there is nothing to tell
        return {}
    tokens, sequences = sums["tokens"], max(sums["sequences"], 1.0)
    found = {
        "mean_log_prob_current": sums["logp"] / sequences,
        "log_prob_per_dim": sums["logp"] / tokens,
    }
    if "entropy" in sums:
        found["entropy"] = sums["entropy"] / tokens
    advantages = max(sums["advantages"], 1.0)
    mean = sums["advantage"] / advantages
    variance = sums["advantage2"] / advantages - mean * mean
    found["std_advantage"] = variance**0.5 if variance > 0 or math.isnan(variance) else 0.0  # rounding
    found["mean_abs_advantage"] = sums["abs_advantage"] / advantages
    if "ratios" in sums:
        count = max(sums["ratios"], 1.0)
        squares = sums["ratio2"]
        found |= {
            "log_ratio": sums["log_ratio"] / count,
            "mean_ratio": sums["ratio"] / count,
            "ess": sums["ratio"] ** 2 / (count * squares) if squares else math.nan,
            "max_abs_log_ratio": math.nan if math.isnan(squares) else max(peaks["log_ratio"], peaks["-log_ratio"]),
            "max_ratio": _exp(peaks["log_ratio"]),
            "min_ratio": _exp(-peaks["-log_ratio"]),
        }
        if "clipped" in sums:
            found["clip_fraction"] = sums["clipped"] / count
        found["step_kl"] = sums["step_kl"] / count
    if "ref_logp" in sums:
        apart = -sums["behind"]
        found |= {
            "mean_log_prob_ref": sums["ref_logp"] / sequences,
            "kl_penalty": apart / sequences,
            "kl_k1": apart / tokens,
            "kl_k2": sums["kl_k2"] / tokens,
            "kl": sums["kl_k3"] / tokens,
            "token_kl": sums["kl_k3"] / tokens,
            "sequence_kl": sums["kl_k3"] / sequences,
            "sequence_kl_k2": sums["kl_k2"] / sequences,
        }
    if sums.get("scored"):
        found["sampler_mismatch"] = sums["mismatch"] / sums["scored"]
    return found


def _only(values_BT: torch.Tensor, here_BT: torch.Tensor) -> torch.Tensor:
    """Return the values as float32, 0 where there is no token: what stands there may be anything, NaN too."""
    return torch.where(here_BT, values_BT.detach().float(), 0.0)


def _add_advantages(sums: dict[str, torch.Tensor], advantages: torch.Tensor, here_BT: torch.Tensor) -> None:
    """Add the advantages: one a completion, or one a token."""
    given = advantages.detach().float()
    if given.dim() > 1 and given.shape[1] == here_BT.shape[1]:
        given = given[here_BT]
    sums |= {
        "advantages": given.new_tensor(float(given.numel())),
        "advantage": given.sum(),
        "advantage2": given.square().sum(),
        "abs_advantage": given.abs().sum(),
    }


def _add_ratio(
    sums: dict[str, torch.Tensor],
    peaks: dict[str, torch.Tensor],
    log_ratio_BT: torch.Tensor,
    here_BT: torch.Tensor,
    surrogate: Surrogate,
) -> None:
    log_ratio, here = log_ratio_BT, here_BT
    if surrogate.sequence:
        log_ratio = log_ratio_BT.sum(dim=1) / here_BT.sum(dim=1).clamp(min=1)
        here = here_BT.any(dim=1)
    ratio = log_ratio.exp()
    counted = here.float()
    sums |= {
        "ratios": counted.sum(),
        "log_ratio": log_ratio.sum(),  # 0 where nothing is counted
        "ratio": (ratio * counted).sum(),
        "ratio2": (ratio.square() * counted).sum(),
        "step_kl": (ratio - 1 - log_ratio).sum(),
    }
    if surrogate.clips:
        outside = (ratio < 1 - surrogate.low) | (ratio > 1 + surrogate.high)
        sums["clipped"] = (outside & here).sum()
    nowhere = -torch.inf
    peaks["log_ratio"] = torch.where(here, log_ratio, nowhere).max()
    peaks["-log_ratio"] = torch.where(here, -log_ratio, nowhere).max()


def _nanstd(values: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of each row (ddof 1) over what is not NaN; NaN where that is fewer than two."""
    known = ~values.isnan()
    count = known.sum(dim=1)
    mean = values.nanmean(dim=1, keepdim=True)
    square = torch.where(known, values - mean, 0.0).square().sum(dim=1)
    return torch.where(count > 1, (square / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def _exp(value: float) -> float:
    """Return the exponential, infinite where it is no float any more."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
