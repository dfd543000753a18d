"""Names: every table says what it says of metrics that exist, and real logs are read by it."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_watchdog.metrics import METRICS
from grpo_watchdog.names import FAMILIES, Key, recognise
from grpo_watchdog.names.page import as_markdown
from grpo_watchdog.names.plain import words

ROOT = Path(__file__).parents[1]
RECORDED = ROOT.parent / "shared" / "recorded_runs"

# What each family writes on a usual row, as its sources have it, and what is to come of it.
ROWS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "trl": (
        {"loss": 0.1, "grad_norm": 2.0, "learning_rate": 1e-6, "reward": 0.5, "reward_std": 0.2, "kl": 0.03,
         "entropy": 1.5, "completions/mean_length": 90.0, "completions/clipped_ratio": 0.25, "step_time": 3.0,
         "frac_reward_zero_std": 0.5, "rewards/right/mean": 0.5, "clip_ratio/region_mean": 0.01, "epoch": 0.1},
        {"loss": 0.1, "grad_norm": 2.0, "learning_rate": 1e-6, "mean_reward": 0.5, "std_reward": 0.2, "kl": 0.03,
         "token_kl": 0.03, "entropy": 1.5, "completion_length": 90.0, "truncated_fraction": 0.25,
         "zero_std_fraction": 0.5, "clip_fraction": 0.01},
    ),
    "unsloth": (
        {"Training Loss": 0.1, "reward": 0.5, "reward_std": 0.2, "completion_length": 90.0, "kl": 0.03},
        {"loss": 0.1, "mean_reward": 0.5, "group_std_reward": 0.2, "completion_length": 90.0, "kl": 0.03,
         "token_kl": 0.03},
    ),
    "ms_swift": (
        {"loss": 0.1, "reward": 0.5, "reward_std": 0.2, "memory(GiB)": 70.0, "train_speed(iter/s)": 0.1},
        {"loss": 0.1, "mean_reward": 0.5, "group_std_reward": 0.2},
    ),
    "verl": (
        {"actor/pg_loss": 0.1, "actor/ppo_kl": 0.02, "actor/kl_loss": 0.3, "actor/kl_coef": 1e-3, "actor/entropy": 0.4,
         "actor/lr(1e-4)": 0.01, "critic/score/mean": 0.5, "critic/rewards/mean": 0.4, "critic/kl": -0.1,
         "critic/vf_loss": 0.2, "response_length/clip_ratio": 0.25, "timing_s/gen": 20.0},
        {"policy_loss": 0.1, "log_ratio": -0.02, "kl": 0.3, "token_kl": 0.3, "kl_coef": 1e-3, "entropy": 0.4,
         "learning_rate": 1e-6, "mean_reward": 0.5, "kl_k1": -0.1, "value_loss": 0.2, "truncated_fraction": 0.25},
    ),
    "openrlhf": (
        {"train/policy_loss": 0.1, "train/actor_lr": 1e-6, "train/reward": 0.5, "train/return": 0.5, "train/kl": -0.1,
         "train/response_length": 90.0, "train/total_length": 100.0, "train/ppo_kl": 0.02, "train/critic_loss": 0.2},
        {"policy_loss": 0.1, "learning_rate": 1e-6, "mean_reward": 0.5, "kl": -0.1, "completion_length": 90.0,
         "log_ratio": -0.02, "value_loss": 0.2},
    ),
    "nemo_rl": (
        {"train/loss": 0.1, "train/reward": 0.5, "train/kl_penalty": 0.03, "train/probs_ratio": 1.01,
         "train/token_mult_prob_error": 1.02, "train/grad_norm": 2.0, "train/mean_gen_tokens_per_sample": 90.0},
        {"loss": 0.1, "mean_reward": 0.5, "kl": 0.03, "token_kl": 0.03, "mean_ratio": 1.01, "grad_norm": 2.0,
         "completion_length": 90.0},
    ),
    "areal": (
        {"ppo_actor/task_reward/avg": 0.5, "ppo_actor/update/approx_kl/avg": 0.02, "timeperf/rollout": 9.0,
         "ppo_actor/update/importance_weight/avg": 1.01, "ppo_actor/update/entropy/avg": 0.4},
        {"mean_reward": 0.5, "log_ratio": 0.02, "mean_ratio": 1.01, "entropy": 0.4},
    ),
    "roll": (
        {"critic/score/mean": 0.5, "actor/pg_loss": 0.1, "actor/total_loss": 0.2, "actor/ppo_ratio_clipfrac": 0.01,
         "actor/ratio_mean": 1.01, "actor/approxkl": 0.001, "actor_train/grad_norm": 2.0},
        {"mean_reward": 0.5, "policy_loss": 0.1, "loss": 0.2, "mean_ratio": 1.01, "grad_norm": 2.0},
    ),
    "prime_rl": (
        {"loss/mean": 0.1, "entropy/mean": 0.4, "mismatch_kl/mean": 0.01, "optim/grad_norm": 2.0, "optim/lr": 1e-6},
        {"loss": 0.1, "entropy": 0.4, "grad_norm": 2.0, "learning_rate": 1e-6},
    ),
    "skyrl": (
        {"reward/avg_raw_reward": 0.5, "policy/policy_entropy": 0.4, "policy/raw_grad_norm": 2.0,
         "policy/final_loss": 0.2, "policy/policy_loss": 0.1, "generate/avg_num_tokens": 90.0},
        {"mean_reward": 0.5, "entropy": 0.4, "grad_norm": 2.0, "loss": 0.2, "policy_loss": 0.1,
         "completion_length": 90.0},
    ),
    "slime": (
        {"rollout/raw_reward": 0.5, "rollout/response_len/mean": 90.0, "train/ppo_kl": 0.02, "train/pg_clipfrac": 0.01,
         "train/entropy_loss": 0.4, "train/train_rollout_logprob_abs_diff": 0.01},
        {"mean_reward": 0.5, "completion_length": 90.0, "log_ratio": -0.02, "clip_fraction": 0.01, "entropy": 0.4,
         "sampler_mismatch": 0.01},
    ),
    "trl_ppo": (
        {"objective/kl": 10.4, "objective/entropy": 80.0, "objective/scores": 0.5, "objective/rlhf_reward": 0.1,
         "policy/approxkl_avg": 0.02, "policy/entropy_avg": 1.5, "val/ratio": 1.01, "loss/value_avg": 0.2, "lr": 1e-6},
        {"kl_penalty": 10.4, "mean_reward": 0.5, "entropy": 1.5, "mean_ratio": 1.01, "value_loss": 0.2,
         "learning_rate": 1e-6},
    ),
    "diffusion": (
        {"reward_mean": 19.0, "reward_std": 0.7, "approx_kl": 1e-4, "clipfrac": 0.3, "loss": 0.01},
        {"mean_reward": 19.0, "std_reward": 0.7, "clip_fraction": 0.3, "loss": 0.01},
    ),
    "deepspeed_chat": (
        {"act_loss": 0.1, "cri_loss": 0.2, "unsuper_loss": 0.0, "Average reward score": 0.5},
        {"policy_loss": 0.1, "value_loss": 0.2, "mean_reward": 0.5},
    ),
    "minimind": (
        {"Reward": 0.5, "KL_ref": -0.02, "Adv Std": 0.9, "Adv Mean": 0.0, "Actor Loss": 0.1, "Avg Response Len": 90.0,
         "Learning Rate": 3e-7},
        {"mean_reward": 0.5, "kl_k1": 0.02, "std_advantage": 0.9, "mean_advantage": 0.0, "loss": 0.1,
         "completion_length": 90.0, "learning_rate": 3e-7},
    ),
    "canonical": (
        {"mean_reward": 0.5, "mean_log_prob_current": -90.0, "mean_log_prob_ref": -91.0, "kl_penalty": 1.0},
        {"mean_reward": 0.5, "mean_log_prob_current": -90.0, "mean_log_prob_ref": -91.0, "kl_penalty": 1.0},
    ),
    "plain": (
        {"Policy Loss": 0.1, "avg_reward": 0.5, "KL": 0.03, "train/grad-norm": 2.0, "lr": 1e-6, "approx_kl": 0.1},
        {"policy_loss": 0.1, "mean_reward": 0.5, "kl": 0.03, "grad_norm": 2.0, "learning_rate": 1e-6},
    ),
}  # fmt: skip


def test_every_family_has_a_row_here() -> None:
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("name", ROWS)
def test_a_usual_row_speaks_for_its_family_and_becomes_what_it_means(name: str) -> None:
    row, meant = ROWS[name]

    assert recognise(row).name == name
    assert FAMILIES[name].canonical(row) == pytest.approx(meant)
    assert FAMILIES[name].unknown(row) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_line_of_a_table_names_a_metric_and_its_pair(name: str) -> None:
    for key in FAMILIES[name].keys:
        for metric in filter(None, (key.canonical, key.also)):
            assert metric in METRICS, key
            told = METRICS[metric].pair
            if told in {"current/reference", "trainer/sampler"}:
                assert key.pair == told, key
            elif told:
                assert key.pair in {told, "current/old"}, key
        assert key.factor != 0.0
        assert key.also in {"", "kl", "token_kl"}
        if key.also == "token_kl":
            assert "token" in key.reduction, key
            assert key.clamped is None or key.clamped[0] == 0.0, key


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "plain"])
def test_no_mark_is_a_key_that_the_family_does_not_know(name: str) -> None:
    family = FAMILIES[name]
    parts = {part for mark in family.marks for part in mark.removeprefix("!").split(" & ")}

    assert parts, "a family that nothing speaks for is never recognised"
    assert family.unknown(part.replace("*", "x") for part in parts) == []


def test_what_nobody_knows_is_listed_in_order_and_never_taken() -> None:
    family = FAMILIES["trl"]
    row = {"reward": 0.5, "kl_to_the_moon": 9.0, "train/brightness": 3.0, "x" * 1000: 1.0}

    assert family.unknown(row) == ["kl_to_the_moon", "train/brightness", "x" * 1000]
    assert family.canonical(row) == {"mean_reward": 0.5}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_the_prefix_of_a_logger_makes_no_difference(prefix: str) -> None:
    row = {f"{prefix}{key}": value for key, value in ROWS["trl"][0].items()}

    assert recognise(row).name == "trl"
    assert FAMILIES["trl"].canonical(row) == ROWS["trl"][1]


def test_the_spread_of_rewards_is_that_of_groups_until_rows_have_a_step_time() -> None:
    family = FAMILIES["trl"]

    assert family.canonical({"reward_std": 0.2, "grad_norm": 1.0})["group_std_reward"] == 0.2
    assert "group_std_reward" not in family.canonical({"reward_std": 0.2, "grad_norm": 1.0, "step_time": 2.0})
    assert family.canonical({"reward_std": 0.2}) == {"std_reward": 0.2}, "a table with chosen columns tells neither"


def test_the_more_trusted_of_two_keys_counts_and_the_other_where_it_is_missing() -> None:
    family = FAMILIES["verl"]

    assert family.canonical({"critic/rewards/mean": 0.4, "critic/score/mean": 0.5})["mean_reward"] == 0.5
    assert family.canonical({"critic/rewards/mean": 0.4})["mean_reward"] == 0.4
    assert math.isnan(family.canonical({"critic/rewards/mean": 0.4, "critic/score/mean": math.nan})["mean_reward"])


def test_a_users_own_key_fills_what_the_trainer_does_not_log_and_nothing_else() -> None:
    row = {"reward": 0.5, "avg_reward": 0.9, "mean_ratio": 1.1, "reward_std": 0.1, "grad_norm": 1.0}

    assert FAMILIES["trl"].canonical(row) == {
        "mean_reward": 0.5, "mean_ratio": 1.1, "group_std_reward": 0.1, "grad_norm": 1.0,
    }  # fmt: skip


def test_groups_of_denoising_steps_are_joined_and_not_a_number_shows() -> None:
    family = FAMILIES["diffusion"]
    row = {"cum/1-2/log_ratio_abs_max": 4.7, "cum/3-5/log_ratio_abs_max": 1.2,
           "cum/1-2/ratio_mean": 0.68, "cum/3-5/ratio_mean": 1.0}  # fmt: skip

    assert family.canonical(row) == pytest.approx({"max_abs_log_ratio": 4.7, "mean_ratio": 0.84})
    row["cum/3-5/log_ratio_abs_max"] = math.nan
    assert math.isnan(family.canonical(row)["max_abs_log_ratio"])


def test_evaluations_and_times_are_known_and_never_taken() -> None:
    keys = [
        "eval/reward",
        "eval_kl",
        "val/loss",
        "test_reward",
        "step_time",
        "timing/gen",
        "tokens_per_second",
        "epoch",
    ]
    for family in FAMILIES.values():
        assert family.unknown(keys) == []
        assert set(family.canonical(dict.fromkeys(keys, 1.0))) == set(), family


def test_kl_in_a_loss_or_to_the_old_policy_is_not_taken_for_one_to_the_reference() -> None:
    keys = ("kl_loss", "approx_kl", "ppo_kl", "entropy_loss", "kl_term")
    assert FAMILIES["plain"].canonical(dict.fromkeys(keys, 1.0)) == {}


def test_what_a_trainer_clamps_is_told() -> None:
    clamped = {(name, k.key) for name, family in FAMILIES.items() for k in family.keys if k.clamped}
    assert {("verl", "actor/kl_loss"), ("openrlhf", "kl"), ("skyrl", "policy/policy_kl")} <= clamped
    assert ("trl", "kl") not in clamped


KEYS = st.sampled_from([key.key.replace("*", "x") for family in FAMILIES.values() for key in family.keys])
NUMBERS = st.floats(width=32)


@given(st.dictionaries(st.one_of(KEYS, st.text(max_size=20)), NUMBERS, max_size=40), st.sampled_from(sorted(FAMILIES)))
def test_any_row_becomes_canonical_metrics_whatever_the_order_of_its_keys(row: dict[str, float], name: str) -> None:
    family = FAMILIES[name]
    found = family.canonical(row)

    assert set(found) <= set(METRICS)
    assert all(type(value) is float for value in found.values())
    turned = family.canonical(dict(reversed(row.items())))
    # Of several spellings of one line the first in the row counts, so that only which metrics there are is the same.
    assert set(turned) == set(found)
    assert recognise(row).name in FAMILIES


@given(st.dictionaries(KEYS, NUMBERS, min_size=1, max_size=20), st.text(max_size=300))
def test_a_key_that_nobody_knows_changes_nothing(row: dict[str, float], key: str) -> None:
    family = recognise(row)
    if family.unknown([key]) == [key]:
        more = family.canonical({**row, key: 1.0})
        assert list(map(str, more.items())) == list(map(str, family.canonical(row).items()))


@given(st.text(max_size=50))
def test_words_of_words_are_the_same(key: str) -> None:
    assert words(words(key)) == words(key)


def test_keys_without_end_stay_within_bounds() -> None:
    family = FAMILIES["plain"]
    began = time.perf_counter()
    for number in range(30_000):
        family.canonical({f"k{number}": 1.0, "loss": 1.0})
    assert recognise(f"per_second_{number}" * 50 for number in range(5000)).name == "plain"
    family.unknown(["_per_second" * 100_000])
    assert time.perf_counter() - began < 10.0


def test_a_row_costs_little() -> None:
    family, row = FAMILIES["trl"], ROWS["trl"][0]
    family.canonical(row)
    began = time.perf_counter()
    for _ in range(10_000):
        family.canonical(row)
    assert (time.perf_counter() - began) / 10_000 < 50e-6


def test_the_page_is_that_of_the_tables() -> None:
    page = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: python -m grpo_watchdog.names.page > docs/names.md"


def test_a_line_says_everything_by_default() -> None:
    key = Key("x", "something")
    assert (key.factor, key.clamped, key.join, key.canonical) == (1.0, None, "first", None)


def _recorded() -> list[str]:
    return sorted(file.name for file in RECORDED.glob("*.json")) if RECORDED.is_dir() else []


@pytest.mark.skipif(not RECORDED.is_dir(), reason="../shared/recorded_runs is absent")
@pytest.mark.parametrize("name", _recorded() or [""])
def test_the_trainers_of_recorded_runs_are_recognised(name: str) -> None:
    log = json.loads((RECORDED / name).read_text(encoding="utf-8"))
    rows = log["log_history"] if isinstance(log, dict) and "log_history" in log else []
    if not rows:
        pytest.skip("not a trainer_state.json")
    keys = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    family = recognise(keys)

    assert family.name in {"trl", "unsloth"}
    assert family.unknown(keys) == []
    found = {metric for row in rows for metric in family.canonical({k: 1.0 for k in row if k in keys})}
    assert {"loss", "mean_reward", "grad_norm", "completion_length"} <= found
    assert ("kl" in keys) == ("token_kl" in found)
    assert ("entropy" in keys) == ("entropy" in found)
