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
from grpo_watchdog.lab.trl_toy import EOS, PAD
from trl_runs import toy

STEPS = 8
STILL = {"weights_touched", "moments_touched", "vetoes", "reference_touched"}  # 0 while nothing happens


class Recording(trl.GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """Keeps what its loss is computed from; knows nothing of the taps."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.batches: dict[int, list[dict[str, Any]]] = {}
        self.drawn: dict[int, torch.Tensor] = {}
        self.others: dict[int, dict[str, float]] = {}  # what is no mean over tokens or rewards
        self.weights = self.trained()

    def trained(self) -> Any:
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters() if p.requires_grad])

    def note(self, **values: float) -> None:
        self.others.setdefault(self.state.global_step + 1, {}).update(values)

    def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*given, **named)
        if named.get("compute_entropy"):
            self.scored = result
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.drawn[self.state.global_step + 1] = rewards.clone()
        ended = self.processing_class.convert_tokens_to_ids([EOS, PAD])
        self.note(
            completion_length=float(np.mean([len(ids) for ids in completion_ids_list])),
            truncated_fraction=float(np.mean([ids[-1] not in ended for ids in completion_ids_list])),
        )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.note(mean_advantage=output["advantages"].double().mean().item())
        return output

    def _clip_grad_norm(self, model: Any) -> Any:
        norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        self.note(grad_norm=torch.stack(norms).norm().item(), learning_rate=self.optimizer.param_groups[0]["lr"])
        return super()._clip_grad_norm(model)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():  # a pass of our own: the log-probs are those of the tokens that were sampled
            logits = model(input_ids=ids, attention_mask=attended).logits[:, inputs["prompt_ids"].size(1) - 1 : -1]
        own = (logits.double() / self.temperature).log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1))
        here = inputs["completion_mask"].bool()
        torch.testing.assert_close(own.squeeze(-1)[here], self.scored[0].double()[here], rtol=0, atol=2e-5)
        kept = {n: v.detach().clone() for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        kept |= {"logp": self.scored[0].detach().clone(), "H": self.scored[1].detach().clone(), "loss": loss.detach()}
        self.batches.setdefault(self.state.global_step + 1, []).append(kept)
        return loss


def in_float64(batches: list[dict[str, Any]], trainer: Any) -> dict[str, float]:
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
        d, w = np.array(ratio), np.exp(ratio)
        found |= {
            "log_ratio": d.mean(), "max_abs_log_ratio": np.abs(d).max(), "mean_ratio": w.mean(), "max_ratio": w.max(),
            "min_ratio": w.min(), "ess": w.sum() ** 2 / (len(w) * (w**2).sum()), "step_kl": (w - 1 - d).mean(),
            "clip_fraction": ((w < 1 - trainer.epsilon_low) | (w > 1 + trainer.epsilon_high)).mean(),
        }  # fmt: skip
    if behind:
        k, n = np.array(behind), len(sums)
        found |= {
            "mean_log_prob_ref": np.mean(ref_sums), "kl_k1": -k.mean(), "kl_k2": (k**2 / 2).mean(),
            "kl": (k3 := (np.exp(k) - k - 1).mean()), "token_kl": k3,
            "kl_penalty": -k.sum() / n, "sequence_kl_k2": (k**2 / 2).sum() / n,
            "sequence_kl": (np.exp(k) - k - 1).sum() / n,
        }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def of_rewards(rewards: torch.Tensor, trainer: Any) -> dict[str, float]:
    given = rewards.numpy().astype(np.float64)
    total = np.nansum(given * trainer.reward_weights.numpy(), axis=1)
    total[np.isnan(given).all(axis=1)] = np.nan
    spread = np.nanstd(total.reshape(-1, trainer.num_generations), axis=1, ddof=1)
    return {
        "mean_reward": float(np.nanmean(total)), "std_reward": float(np.nanstd(total, ddof=1)),
        "group_std_reward": float(np.nanmean(spread)), "zero_std_fraction": float((spread <= 1e-8).mean()),
    }  # fmt: skip


def long_answers(completions: list[str], **_: Any) -> list[float | None]:
    return [None if len(text) % 3 == 0 else float(len(text)) for text in completions]


def of_five_letters(completions: list[str], **_: Any) -> list[float | None]:
    return [None if len(text.split()) == 5 else float("a" in text) for text in completions]  # then both say nothing


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
    "two rewards": {"rewards": [long_answers, of_five_letters]},
    "clipped": {"learning_rate": 0.01, "epsilon_high": 0.28, "delta": 1.5, "temperature": 0.7},
}
WARM: dict[str, Any] = {"max_steps": STEPS, "trainer_class": Recording, "warmup_steps": 1}  # the ratio lives at once


def watched(folder: Path, rules: str = "guarded", **settings: Any) -> tuple[Any, dict[int, dict[str, float]]]:
    functions = settings.pop("rewards", None)
    trainer: Any = toy(folder, **{**WARM, **settings})
    if functions is not None:
        trainer.reward_funcs, trainer.reward_func_names = functions, ["a", "b"]
        trainer.reward_processing_classes, trainer.reward_weights = [None, None], torch.tensor([1.0, 0.5])
    dog = gw.attach(trainer, rules=rules, checkpoint_every=0, mode="shadow")  # beta and the rate stay as they are
    seen = dict[int, dict[str, float]]()

    def keep(step: Any, _: object) -> None:
        seen[step.number], noted = dict(step.values), trainer.others[step.number]
        now, then = trainer.trained(), trainer.weights
        noted["param_change"] = ((now - then).norm() / then.norm()).item()
        noted["learning_rate"] = max(noted["learning_rate"], trainer.optimizer.param_groups[0]["lr"])  # the next step's
        trainer.weights = now

    dog._listeners.append(keep)
    trainer.train()
    assert list(seen) == list(range(1, STEPS + 1))
    return trainer, seen


def settings_of(trainer: Any) -> dict[str, float]:
    found = {"clip_epsilon": trainer.epsilon_high} | ({"kl_coef": trainer.beta} if trainer.beta else {})
    return found | {f"{name}_set": value for name, value in found.items()} | {"grad_norm_limit": 1.0}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_metric_is_what_the_tensors_say(tmp_path: Path, name: str) -> None:
    trainer, seen = watched(tmp_path, **SETTINGS[name])
    args = trainer.args
    per_batch = args.steps_per_generation * trainer.num_iterations // args.gradient_accumulation_steps  # [steps]
    for number, values in seen.items():
        wanted = in_float64(trainer.batches[number], trainer) | trainer.others[number] | settings_of(trainer)
        wanted |= {"learning_rate_set": wanted["learning_rate"]} | dict.fromkeys(STILL & set(values), 0.0)
        if number in trainer.drawn:
            wanted |= of_rewards(trainer.drawn[number], trainer)
        if (number - 1) % per_batch != 1:
            wanted.pop("step_kl", None)  # given on the first update after sampling
        assert set(values) == set(wanted) | {"policy_loss"}  # which has a test of its own
        for metric, value in wanted.items():
            near = 1e-2 if metric == "param_change" else 1e-5  # it is taken from a sample of the weights
            assert values[metric] == pytest.approx(value, rel=near, abs=1e-6), (number, metric)
    assert (name == "two rewards") == any(rewards.isnan().all(dim=1).any() for rewards in trainer.drawn.values())


def reduced(trainer: Any, batch: dict[str, Any], term: torch.Tensor) -> torch.Tensor:
    here = batch["completion_mask"].double()
    term = term * here
    means = {
        "grpo": (term.sum(-1) / here.sum(-1).clamp(min=1)).mean(),
        "bnpo": term.sum() / here.sum().clamp(min=1),
        "dr_grpo": term.sum() / (len(term) * trainer.max_completion_length),
        "luspo": term.sum(-1).mean(),
        "dapo": term.sum() / batch["num_items_in_batch"].double() * trainer.args.steps_per_generation,
    }
    mean: torch.Tensor = means[trainer.loss_type] / trainer.args.gradient_accumulation_steps
    return mean


def terms_of(trainer: Any, batch: dict[str, Any]) -> tuple[float, float]:
    logp, old, ref = (batch[name].double() for name in ("logp", "old_per_token_logps", "ref_per_token_logps"))
    here, a = batch["completion_mask"].double(), batch["advantages"].double().unsqueeze(1)
    apart, behind = logp - old, ref - logp
    if trainer.importance_sampling_level == "sequence":
        apart = ((apart * here).sum(-1) / here.sum(-1).clamp(min=1)).unsqueeze(-1)
    ratio = apart.exp()
    inside = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
    lost = -torch.minimum(ratio.clamp(max=trainer.args.delta or torch.inf) * a, inside * a)
    k3 = (behind.exp() - behind - 1) * (ratio if trainer.args.use_bias_correction_kl else 1.0)
    return reduced(trainer, batch, lost).item(), trainer.beta * reduced(trainer, batch, k3).item()


@pytest.mark.parametrize("more", [{"use_bias_correction_kl": False}, SETTINGS["accumulated"], SETTINGS["clipped"]])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "luspo", "dapo"])
def test_the_loss_is_the_sum_of_its_terms(tmp_path: Path, loss_type: str, more: dict[str, Any]) -> None:
    level = "sequence" if loss_type == "luspo" else "token"
    trainer, seen = watched(tmp_path, "documented", loss_type=loss_type, importance_sampling_level=level, **more)
    for number, row in seen.items():
        policy, penalty = map(sum, zip(*(terms_of(trainer, b) for b in trainer.batches[number]), strict=True))
        assert row["policy_loss"] == pytest.approx(policy, rel=1e-5, abs=1e-6), number
        assert row["policy_loss"] + penalty == pytest.approx(row["loss"], rel=1e-5, abs=1e-6), number


def test_one_host_transfer_a_step(tmp_path: Path) -> None:
    for rules in ("documented", "guarded"):
        trainer = toy(tmp_path / rules, max_steps=STEPS)
        dog = gw.attach(trainer, rules=rules)
        trainer.train()
        taps: Any = dog._actuator._controls._taps  # type: ignore[attr-defined]
        assert taps.transfers == STEPS


def test_what_fails_inside_the_taps_does_not_reach_the_training(tmp_path: Path) -> None:
    trainer = toy(tmp_path, max_steps=3)
    dog = gw.attach(trainer)
    dog._actuator._controls._taps.surrogate = None  # type: ignore[attr-defined]
    trainer.train()
    assert trainer.state.global_step == 3


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 6)), st.integers(0, 2**31 - 1), st.booleans())
def test_laws_of_the_tally(shape: tuple[int, int], seed: int, sequence: bool) -> None:  # noqa: FBT001
    source = torch.Generator().manual_seed(seed)
    logp, old, ref = (-2 * torch.rand(shape, generator=source) for _ in range(3))
    mask = (torch.rand(shape, generator=source) < 0.7).int()
    mask[:, 0] = 1
    unscored = torch.rand(shape, generator=source) < 0.3
    batch = {
        "completion_mask": mask, "advantages": torch.randn(shape[0], generator=source), "old_per_token_logps": old,
        "ref_per_token_logps": ref, "sampling_per_token_logps": torch.where(unscored, torch.nan, old - 0.25),
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
    assert min(whole["kl"], whole["kl_k2"]) >= -1e-6
    assert whole["min_ratio"] <= whole["mean_ratio"] * (1 + 1e-5)
    assert math.log(whole["mean_ratio"]) >= whole["log_ratio"] - 1e-5  # Jensen
    scored = bool((mask.bool() & ~unscored).any())
    assert whole.get("sampler_mismatch") == (pytest.approx(0.25, abs=1e-6) if scored else None)
