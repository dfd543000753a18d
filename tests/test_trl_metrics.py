"""What the taps give, against the same computed in float64 from the tensors that the trainer's own loss was given."""
# ruff: noqa: ANN401, E402, SLF001 - a trainer's tensors, and its private methods, are what is looked at

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

trl: Any = pytest.importorskip("trl")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.integrations.trl_stats import Surrogate, metrics, token_tally
from grpo_watchdog.lab.trl_toy import repeat_reward, toy_trainer

STEPS = 8


class Recording(trl.GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """Keeps what its loss is computed from; knows nothing of the taps."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.batches: dict[int, list[dict[str, Any]]] = {}
        self.drawn: dict[int, torch.Tensor] = {}

    def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*given, **named)
        if named.get("compute_entropy"):
            self.scored = result
        return result

    def _calculate_rewards(self, *given: Any, **named: Any) -> Any:
        rewards = super()._calculate_rewards(*given, **named)
        self.drawn[self.state.global_step + 1] = rewards.clone()
        return rewards

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        kept = {n: v.detach().clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        kept |= {"logp": self.scored[0].detach().clone(), "H": self.scored[1].detach().clone(), "loss": loss.detach()}
        self.batches.setdefault(self.state.global_step + 1, []).append(kept)
        return loss


def in_float64(batches: list[dict[str, Any]], trainer: Any) -> dict[str, float]:
    """Return the metrics of one step from its micro-batches, token by token, in numpy."""
    logp, entropy, ratio, behind, advantage, sums, ref_sums = [], [], [], [], [], [], []
    for b in batches:
        here = b["completion_mask"].numpy().astype(bool)
        cur = b["logp"].numpy().astype(np.float64)
        logp += list(cur[here])
        entropy += list(b["H"].numpy().astype(np.float64)[here])
        sums += [row[m].sum() for row, m in zip(cur, here, strict=True)]
        advantage += list(b["advantages"].numpy().astype(np.float64))
        if "old_per_token_logps" in b:
            apart = cur - b["old_per_token_logps"].numpy().astype(np.float64)
            if trainer.importance_sampling_level == "sequence":
                ratio += [row[m].mean() for row, m in zip(apart, here, strict=True) if m.any()]
            else:
                ratio += list(apart[here])
        if "ref_per_token_logps" in b:
            ref = b["ref_per_token_logps"].numpy().astype(np.float64)
            behind += list((ref - cur)[here])
            ref_sums += [row[m].sum() for row, m in zip(ref, here, strict=True)]
    a = np.array(advantage)
    found = {
        "mean_log_prob_current": np.mean(sums), "log_prob_per_dim": np.mean(logp), "entropy": np.mean(entropy),
        "std_advantage": a.std(), "mean_abs_advantage": np.abs(a).mean(),
        "loss": sum(b["loss"].item() for b in batches),
    }  # fmt: skip
    if ratio:
        d = np.array(ratio)
        w = np.exp(d)
        found |= {
            "log_ratio": d.mean(), "max_abs_log_ratio": np.abs(d).max(), "mean_ratio": w.mean(), "max_ratio": w.max(),
            "min_ratio": w.min(), "ess": w.sum() ** 2 / (len(w) * (w**2).sum()), "step_kl": (w - 1 - d).mean(),
            "clip_fraction": ((w < 1 - trainer.epsilon_low) | (w > 1 + trainer.epsilon_high)).mean(),
        }  # fmt: skip
    if behind:
        k, n = np.array(behind), len(sums)
        found |= {
            "mean_log_prob_ref": np.mean(ref_sums), "kl_k1": -k.mean(), "kl_k2": (k**2 / 2).mean(),
            "kl": (np.exp(k) - k - 1).mean(), "kl_penalty": -k.sum() / n, "sequence_kl_k2": (k**2 / 2).sum() / n,
            "sequence_kl": (np.exp(k) - k - 1).sum() / n,
        }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def of_rewards(rewards: torch.Tensor, trainer: Any) -> dict[str, float]:
    given = rewards.numpy().astype(np.float64)
    total = np.nansum(given * trainer.reward_weights.numpy(), axis=1)
    total[np.isnan(given).all(axis=1)] = np.nan
    groups = total.reshape(-1, trainer.num_generations)
    spread = np.nanstd(groups, axis=1, ddof=1)
    return {
        "mean_reward": float(np.nanmean(total)), "std_reward": float(np.nanstd(total, ddof=1)),
        "group_std_reward": float(np.nanmean(spread)), "zero_std_fraction": float((spread <= 1e-8).mean()),
    }  # fmt: skip


def long_answers(completions: list[str], **_: Any) -> list[float | None]:
    return [None if len(text) % 3 == 0 else float(len(text)) for text in completions]


SETTINGS: dict[str, dict[str, Any]] = {
    "two updates of each sample": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "accumulated": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 16},
    "lora": {"lora": True},
    "no reference": {"beta": 0.0},
    "on-policy": {"num_iterations": 1},
    "truncated are masked": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_metric_is_what_the_tensors_say(tmp_path: Path, name: str) -> None:
    trainer: Any = toy_trainer(tmp_path, max_steps=STEPS, trainer_class=Recording, **SETTINGS[name])
    dog = gw.attach(trainer, rules="guarded")
    seen: dict[int, dict[str, float]] = {}
    dog._listeners.append(lambda step, _: seen.update({step.number: dict(step.values)}))
    trainer.train()
    assert sorted(seen) == list(range(1, STEPS + 1))
    told = 0
    for number, values in seen.items():
        wanted = in_float64(trainer.batches[number], trainer)
        if number in trainer.drawn:
            wanted |= of_rewards(trainer.drawn[number], trainer)
        else:
            assert "mean_reward" not in values
        for metric, value in wanted.items():
            if metric == "step_kl" and metric not in values:
                continue  # given on the first update after sampling
            assert values[metric] == pytest.approx(value, rel=2e-5, abs=3e-6), f"step {number}: {metric}"
            told += 1
    assert told > 10 * STEPS
    present = set().union(*seen.values())
    assert ("log_ratio" in present) == (name != "on-policy")
    assert ("step_kl" in present) == (name != "on-policy")
    assert ("kl" in present) == (name != "no reference")
    assert {"policy_loss", "grad_norm", "completion_length", "truncated_fraction", "mean_advantage"} <= present


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_loss_is_the_sum_of_its_terms(tmp_path: Path, loss_type: str) -> None:
    """What is left of the loss is beta times k3, reduced as this loss reduces it."""
    trainer: Any = toy_trainer(
        tmp_path, max_steps=STEPS, trainer_class=Recording, loss_type=loss_type, use_bias_correction_kl=False
    )
    dog = gw.attach(trainer)
    rows: dict[int, dict[str, float]] = {}
    dog._listeners.append(lambda step, _: rows.update({step.number: dict(step.values)}))
    trainer.train()
    for number, row in rows.items():
        (b,) = trainer.batches[number]
        here = b["completion_mask"].double()
        behind = (b["ref_per_token_logps"] - b["logp"]).double()
        k3 = (behind.exp() - behind - 1) * here
        reduced = {
            "grpo": (k3.sum(-1) / here.sum(-1)).mean(),
            "bnpo": k3.sum() / here.sum(),
            "dr_grpo": k3.sum() / (len(k3) * trainer.max_completion_length),
            "dapo": k3.sum() / b["num_items_in_batch"].double(),
        }[loss_type]
        assert row["loss"] - row["policy_loss"] == pytest.approx(0.04 * reduced.item(), rel=1e-3, abs=1e-6)


def test_two_reward_functions_of_which_one_may_say_nothing(tmp_path: Path) -> None:
    trainer: Any = toy_trainer(tmp_path, max_steps=STEPS, trainer_class=Recording)
    trainer.reward_funcs, trainer.reward_func_names = [repeat_reward, long_answers], ["repeat", "long"]
    trainer.reward_processing_classes = [None, None]
    trainer.reward_weights = torch.tensor([1.0, 0.5])
    dog = gw.attach(trainer)
    seen: dict[int, dict[str, float]] = {}
    dog._listeners.append(lambda step, _: seen.update({step.number: dict(step.values)}))
    trainer.train()
    assert len(trainer.drawn) == STEPS // 2
    for number, rewards in trainer.drawn.items():
        assert rewards.isnan().any()
        for metric, value in of_rewards(rewards, trainer).items():
            assert seen[number][metric] == pytest.approx(value, rel=1e-5), metric


def test_one_host_transfer_a_step(tmp_path: Path) -> None:
    for rules in ("documented", "guarded"):
        trainer = toy_trainer(tmp_path / rules, max_steps=STEPS)
        dog = gw.attach(trainer, rules=rules)
        trainer.train()
        taps: Any = dog._actuator._controls._taps  # type: ignore[attr-defined]
        assert taps.transfers == STEPS


def test_what_fails_inside_the_taps_does_not_reach_the_training(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=3)
    dog = gw.attach(trainer)
    dog._actuator._controls._taps.surrogate = None  # type: ignore[attr-defined]
    trainer.train()
    assert trainer.state.global_step == 3


shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31 - 1), st.booleans())
def test_laws_of_the_tally(shape: tuple[int, int], seed: int, sequence: bool) -> None:  # noqa: FBT001
    source = torch.Generator().manual_seed(seed)
    logp, old, ref = (-2 * torch.rand(shape, generator=source) for _ in range(3))
    mask = (torch.rand(shape, generator=source) < 0.7).int()
    mask[:, 0] = 1
    batch = {
        "completion_mask": mask, "advantages": torch.randn(shape[0], generator=source), "old_per_token_logps": old,
        "ref_per_token_logps": ref, "sampling_per_token_logps": old,
    }  # fmt: skip
    surrogate = Surrogate(sequence, 0.2, 0.3, clips=True)

    def told(pieces: list[slice], junk: float = 0.0) -> dict[str, float]:
        total = None
        for piece in pieces:
            part = {n: v[piece].clone() for n, v in batch.items()}
            for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
                part[name][part["completion_mask"] == 0] = junk
            now = token_tally(part, logp[piece], logp[piece].abs(), surrogate)
            total = now if total is None else total.plus(now)
        assert total is not None
        return metrics({n: v.item() for n, v in total.sums.items()}, {n: v.item() for n, v in total.peaks.items()})

    whole = told([slice(None)])
    split = told([slice(i, i + 1) for i in range(shape[0])])
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert told([slice(None)], junk=math.nan) == pytest.approx(whole, rel=1e-6, abs=1e-7)
    assert 0 < whole["ess"] <= 1 + 1e-6
    assert whole["step_kl"] >= -1e-6
    assert whole["kl"] >= -1e-6
    assert whole["min_ratio"] <= whole["mean_ratio"] * (1 + 1e-5)
    assert math.log(whole["mean_ratio"]) >= whole["log_ratio"] - 1e-5  # Jensen
    assert whole["sampler_mismatch"] == 0.0
