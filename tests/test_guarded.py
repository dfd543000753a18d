"""The guarded rulebook: it leaves healthy runs alone, knows each violation by its cause, and needs a witness."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from fakes import FakeControls
from grpo_watchdog import examples
from grpo_watchdog.actions import WATCHFUL
from grpo_watchdog.metrics import METRICS
from grpo_watchdog.rule import RANK

BOOK = gw.load("guarded")
NAN = math.nan
STEPS = 300
Row = dict[str, float]
Rows = list[Row]


# ── the page itself ───────────────────────────────────────────────────────────────────────────────────────────────
def test_every_rule_says_where_it_comes_from_in_both_languages() -> None:
    for name, rule in BOOK.rules.items():
        assert rule.source.strip(), name
        assert rule.title.en.strip(), name
        assert any("一" <= letter <= "鿿" for letter in rule.title.zh), name
        assert set(rule.causes) <= set(BOOK.causes), name
        for other in (*rule.inhibits, *rule.corroborated_by, *rule.contradicted_by):
            assert other in BOOK.rules, (name, other)


def test_every_rule_that_acts_names_a_cause() -> None:
    silent = [name for name, rule in BOOK.rules.items() if any(level.do for level in rule.ladder) and not rule.causes]
    assert silent == ["gradient_drifts"]  # it only takes a checkpoint


def test_the_examples_come_out_as_they_say() -> None:
    count, failures = examples.run(BOOK)
    assert count >= 29
    assert failures == []


# ── healthy runs ──────────────────────────────────────────────────────────────────────────────────────────────────
def learned(n: int, pace: float = 80.0) -> float:
    """How far a run has learned, 0 to 1."""
    return 1 - math.exp(-n / pace)


def trl_like(rng: np.random.Generator, steps: int = STEPS) -> Rows:
    """A language model under TRL: noisy norms, KL that rises with the reward, entropy that falls with it."""
    rows = []
    for n in range(steps):
        z = rng.standard_normal(6)
        gain = learned(n)
        rows.append({
            "loss": 0.002 * gain + 0.01 * z[0], "kl": 0.05 * gain * math.exp(0.2 * z[1]) + 1e-5, "kl_coef": 0.04,
            "grad_norm": 0.3 * math.exp(0.25 * z[2]), "learning_rate": 1e-6 * (1 - n / steps),
            "mean_reward": 0.3 + 0.4 * gain + 0.04 * z[3], "std_reward": 0.35 + 0.02 * z[4],
            "zero_std_fraction": float(np.clip(0.2 + 0.3 * gain + 0.08 * z[5], 0, 1)),
            "entropy": 0.6 - 0.3 * gain + 0.01 * z[1], "completion_length": 200.0 + 100 * gain,
            "clip_fraction": 0.01,
        })  # fmt: skip
    return rows


def verl_like(rng: np.random.Generator, steps: int = STEPS) -> Rows:
    """A language model whose sampler runs in another precision; the loss and its terms are logged."""
    rows = []
    for n in range(steps):
        z = rng.standard_normal(7)
        gain = learned(n, 120)
        policy, kl = 0.02 * z[0], 0.02 * gain * math.exp(0.2 * z[1]) + 1e-5
        rows.append({
            "policy_loss": policy, "kl": kl, "kl_coef": 0.001, "loss": policy + 0.001 * kl,
            "grad_norm": 0.2 * math.exp(0.3 * z[2]), "learning_rate": 1e-6,
            "mean_reward": 0.2 + 0.5 * gain + 0.03 * z[3],
            "std_reward": 0.4 + 0.02 * z[4], "zero_std_fraction": float(np.clip(0.3 + 0.06 * z[5], 0, 1)),
            "entropy": 0.5 - 0.2 * gain + 0.01 * z[6], "step_kl": 2e-4 * math.exp(0.5 * z[1]),
            "sampler_mismatch": 0.01 * math.exp(0.1 * z[6]), "ess": 0.98,
        })  # fmt: skip
    return rows


def nine_metrics(rng: np.random.Generator, steps: int = STEPS) -> Rows:
    """What the document's trainer logs, in its healthy ranges."""
    rows = []
    for n in range(steps):
        z = rng.standard_normal(6)
        gain = learned(n)
        policy, kl = 0.05 * z[0], 0.3 * gain + 0.03 * z[1]
        rows.append({
            "loss": policy + 0.1 * kl, "policy_loss": policy, "kl_penalty": kl, "mean_ratio": 1.1 + 0.03 * z[2],
            "mean_advantage": 1e-7 * z[3], "mean_log_prob_current": -256.8 + 0.5 * z[4],
            "mean_log_prob_ref": -257.0 + 0.5 * z[4] - kl, "mean_reward": 0.5 + 0.2 * gain + 0.02 * z[5],
            "std_reward": 0.15 + 0.01 * z[3],
        })  # fmt: skip
    return rows


def ddpo_like(rng: np.random.Generator, steps: int = STEPS) -> Rows:
    """A diffusion model under attach, with everything that the watchdog measures itself."""
    rows = []
    for n in range(steps):
        z = rng.standard_normal(6)
        gain = learned(n, 100)
        rows.append({
            "loss": 0.003 * z[0], "grad_norm": 0.5 * math.exp(0.2 * z[1]), "learning_rate": 3e-4,
            "learning_rate_set": 3e-4, "mean_reward": 0.2 + 0.3 * gain + 0.02 * z[2], "std_reward": 0.12 + 0.01 * z[3],
            "mean_log_prob_current": -25.0 + 0.2 * z[4], "step_kl": 1e-3 * math.exp(0.5 * z[5]),
            "param_change": 2e-4 * math.exp(0.15 * z[1]), "sampler_mismatch": 1e-6 * math.exp(0.3 * z[2]),
            "weights_touched": 0.0, "moments_touched": 0.0, "reference_touched": 0.0, "vetoes": 0.0,
            "zero_std_fraction": 0.0, "clip_fraction": 0.05,
        })  # fmt: skip
    return rows


def solved(rng: np.random.Generator) -> Rows:
    """A task that is solved half way through: no differences between rewards are left."""
    rows = trl_like(rng)
    for n, row in enumerate(rows):
        share = min(1.0, 0.3 + n / 150)
        odds = 1 - 0.7 * (1 - share)
        done = share >= 1
        row["mean_reward"] = 1.0 if done else min(1.0, odds + 0.02 * rng.standard_normal())
        row["std_reward"] = 0.0 if done else math.sqrt(max(odds * (1 - odds), 0.0))
        row["zero_std_fraction"] = 1.0 if done else share
        if done:
            row["loss"] = 0.0
    return rows


def warmed_up(rng: np.random.Generator) -> Rows:
    """A learning rate from 0, and a norm that is large at first."""
    rows = ddpo_like(rng)
    for n, row in enumerate(rows):
        row["learning_rate"] = row["learning_rate_set"] = 3e-4 * min(1.0, n / 40)
        row["param_change"] *= max(min(1.0, n / 40), 1e-3)
        row["grad_norm"] *= 1 + 2 * math.exp(-n / 20)
    return rows


def resumed(rng: np.random.Generator) -> Rows:
    """Half of a run, and the other half from an earlier step: a little of what was learned is lost."""
    rows = trl_like(rng)
    return rows[:150] + rows[130:280]


def smaller_batch(rng: np.random.Generator) -> Rows:
    """A quarter of the batch from half way on: noise doubles, and so do norms."""
    rows, mean = trl_like(rng), trl_like(np.random.default_rng(0))
    for n in range(150, STEPS):
        level = 0.3 + 0.4 * learned(n)
        rows[n]["mean_reward"] = level + 2 * (rows[n]["mean_reward"] - level)
        rows[n]["grad_norm"] *= 2
        rows[n]["kl"] = mean[n]["kl"]
    return rows


def spiky(rng: np.random.Generator) -> Rows:
    """KL that spikes for one step, some hundred times its level, and heals: seen in long runs on Unsloth."""
    rows = trl_like(rng)
    for n in rng.choice(np.arange(20, STEPS), 6, replace=False):
        rows[n]["kl"] = 30.0
        rows[n]["loss"] += 1.2
        rows[n]["grad_norm"] *= 8
    return rows


def rarely_rewarded(rng: np.random.Generator) -> Rows:
    """A hard task: most batches have no success at all."""
    rows = trl_like(rng)
    for row in rows:
        wins = rng.binomial(64, 0.005)
        row["mean_reward"], row["std_reward"] = wins / 64, math.sqrt(wins / 64 * (1 - wins / 64))
        row["zero_std_fraction"] = 1 - wins / 8
        row["loss"] = 0.0 if not wins else row["loss"]
    return rows


HEALTHY: list[Callable[[np.random.Generator], Rows]] = [
    trl_like, verl_like, nine_metrics, ddpo_like, solved, warmed_up, resumed, smaller_batch, spiky, rarely_rewarded,
]  # fmt: skip


def watched(rows: Sequence[Mapping[str, float]], folder: Path, **policy: Any) -> list[gw.Verdict]:
    """The verdicts on a run whose settings are its rows' own, and that could be rolled back; nothing inside fails."""
    controls = FakeControls(without=("learning_rate", "kl_coef", "clip_epsilon"))
    with gw.Watchdog(BOOK, controls=controls, run_dir=folder, **policy) as dog:
        verdicts = [dog.observe(step, row) for step, row in enumerate(rows)]
    assert not [n for v in verdicts for n in v.notices if "failed" in n]
    return verdicts


def told(verdicts: Sequence[gw.Verdict]) -> list[tuple[int, str, str]]:
    """What was above a notice."""
    return [(v.step, f.rule, f.severity) for v in verdicts for f in v.findings if RANK[f.severity] > RANK["notice"]]


def done(verdicts: Sequence[gw.Verdict]) -> list[tuple[int, str]]:
    """What touched the run; taking a checkpoint does not."""
    return [(v.step, a.action) for v in verdicts for a in v.actions if a.ok and a.action not in WATCHFUL]


@pytest.mark.parametrize("kind", HEALTHY, ids=lambda kind: str(kind.__name__))
def test_a_healthy_run_is_left_alone(kind: Callable[[np.random.Generator], Rows], tmp_path: Path) -> None:
    for seed in range(3):
        verdicts = watched(kind(np.random.default_rng(seed)), tmp_path / str(seed))
        assert told(verdicts) == []
        assert done(verdicts) == []
        assert not verdicts[-1].halt


# ── violations ────────────────────────────────────────────────────────────────────────────────────────────────────
class Case(NamedTuple):
    """A run that is healthy for 60 steps, what is then wrong, and what must be said and done about it."""

    kind: Callable[[np.random.Generator], Rows]
    wrong: Callable[[Row], Mapping[str, float]]
    rule: str
    cause: str
    action: str


def fixed(**values: float) -> Callable[[Row], Mapping[str, float]]:
    return lambda _: values


def times(**factors: float) -> Callable[[Row], Mapping[str, float]]:
    return lambda row: {name: factor * row[name] for name, factor in factors.items()}


CASES = [
    Case(ddpo_like, fixed(weights_touched=0.3), "weights_touched", "weights_overwritten", "rollback"),
    Case(ddpo_like, fixed(moments_touched=1.0), "moments_touched", "moments_overwritten", "rollback"),
    Case(
        ddpo_like, lambda row: {"reference_touched": 0.5, **times(param_change=10)(row)},
        "reference_touched", "reference_not_frozen", "rollback",
    ),
    Case(verl_like, lambda row: {"loss": row["loss"] - 2.0}, "loss_identity", "entropy_term_wrong", "rollback"),
    Case(ddpo_like, fixed(sampler_mismatch=0.4), "sampler_mismatch", "trajectory_mismatch", "rollback"),
    Case(verl_like, times(sampler_mismatch=30), "sampler_mismatch", "trajectory_mismatch", "rollback"),
    Case(
        trl_like, fixed(zero_std_fraction=1.0, std_reward=0.0, mean_reward=0.0),
        "signal_lost", "reward_without_discrimination", "pause",
    ),
    Case(
        ddpo_like, lambda row: {"learning_rate_set": 3e-3, **times(param_change=10, step_kl=100)(row)},
        "learning_rate_moved", "learning_rate_too_high", "rollback",
    ),
    Case(
        ddpo_like, lambda row: {"kl_coef_set": 4.0, **times(param_change=10)(row)},
        "kl_coef_raised", "kl_coef_too_large", "rollback",
    ),
    Case(ddpo_like, times(step_kl=1000), "update_too_large", "learning_rate_too_high", "rollback"),
    Case(ddpo_like, fixed(loss=NAN), "nonfinite", "bad_batch", "rollback"),
]  # fmt: skip


def broken(case: Case, at: int = 60, count: int = 6, seed: int = 0) -> Rows:
    rows = [{"kl_coef_set": 0.04, **row} for row in case.kind(np.random.default_rng(seed))[: at + count]]
    return [row if n < at else {**row, **case.wrong(row)} for n, row in enumerate(rows)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.kind.__name__}")
def test_a_violation_is_known_by_its_cause_and_acted_on(case: Case, tmp_path: Path) -> None:
    rows = broken(case)
    verdicts = watched(rows, tmp_path)
    assert told(verdicts[:60]) == []
    first = done(verdicts)[0]
    assert first[1] == case.action
    assert 60 <= first[0] <= 63
    (incident,) = (i for i in verdicts[first[0]].incidents if i.severity == "critical")
    assert incident.rule == case.rule
    assert incident.causes[0].cause == case.cause


COPIES = Case(trl_like, fixed(zero_std_fraction=1.0), "identical_groups", "identical_samples", "rollback")


def test_equal_samples_within_different_groups_are_acted_on(tmp_path: Path) -> None:
    verdicts = watched(broken(COPIES), tmp_path)
    step, action = done(verdicts)[0]
    assert (step <= 64, action) == (True, "rollback")
    (incident,) = verdicts[step].incidents
    assert incident.rule == COPIES.rule
    assert COPIES.cause in {ranked.cause for ranked in incident.causes}


def test_equal_samples_within_different_groups_are_known_by_their_cause(tmp_path: Path) -> None:
    verdicts = watched(broken(COPIES), tmp_path)
    (incident,) = verdicts[done(verdicts)[0][0]].incidents
    assert incident.causes[0].cause == COPIES.cause


def test_a_reference_that_is_moved_on_purpose_is_only_reported(tmp_path: Path) -> None:
    rows = [{**row, "reference_touched": 0.1 * (n // 50)} for n, row in enumerate(ddpo_like(np.random.default_rng(0)))]
    verdicts = watched(rows, tmp_path)
    assert {(rule, severity) for _, rule, severity in told(verdicts)} == {("reference_touched", "warning")}
    assert done(verdicts) == []


def test_what_comes_back_and_does_no_harm_is_only_acted_on_once(tmp_path: Path) -> None:
    rows = broken(CASES[0], count=60)
    assert [action for _, action in done(watched(rows, tmp_path))] == ["rollback"]


def test_a_pause_ends_with_its_reason(tmp_path: Path) -> None:
    lost = next(case for case in CASES if case.rule == "signal_lost")
    rows = [*broken(lost), *trl_like(np.random.default_rng(1))[60:80]]
    actions = done(watched(rows, tmp_path))
    assert [action for _, action in actions] == ["pause", "unpause"]
    assert actions[1][0] <= 69


def test_a_lost_kl_coefficient_is_given_back(tmp_path: Path) -> None:
    controls = FakeControls(restorable=False)
    with gw.Watchdog(BOOK, controls=controls, run_dir=tmp_path) as dog:
        for step, row in enumerate(ddpo_like(np.random.default_rng(0))[:60]):
            if step == 40:
                controls.settings["kl_coef"] = 0.001
            verdict = dog.observe(step, row)
            if step == 40:
                assert [(a.action, a.after) for a in verdict.actions] == [("raise_kl_coef", 0.1)]
                (incident,) = verdict.incidents
                assert incident.rule == "kl_coef_lost"
                assert incident.causes[0].cause == "kl_coef_too_small"


def test_a_skipped_step_is_reported_with_its_cause_and_nothing_more_is_done(tmp_path: Path) -> None:
    rows = ddpo_like(np.random.default_rng(0))[:70]
    rows[60] |= {"vetoes": 1.0, "loss": NAN, "grad_norm": 1e6}
    verdicts = watched(rows, tmp_path)
    symptoms = {f.rule for v in verdicts for f in v.findings if f.inhibited_by == "veto"}
    assert {rule for _, rule, _ in told(verdicts)} - symptoms == {"veto"}
    assert verdicts[60].incidents[0].causes[0].cause == "bad_batch"
    assert done(verdicts) == []


def test_one_step_that_heals_is_no_reason(tmp_path: Path) -> None:
    for case in CASES:
        once = broken(case, count=1) + case.kind(np.random.default_rng(0))[61:75]
        touched = case.rule in ("weights_touched", "moments_touched", "reference_touched")
        if not touched and not case.rule.endswith(("_moved", "_raised")):
            assert done(watched(once, tmp_path / f"{case.rule}-{case.kind.__name__}")) == [], case.rule


# ── a reward that falls, and the document's bands ─────────────────────────────────────────────────────────────────
def dropped(rows: Rows, at: int = 100) -> Rows:
    """The same rows, with half of the reward gone from a step on."""
    return [{**row, "mean_reward": row["mean_reward"] * (1 if n < at else 0.4)} for n, row in enumerate(rows)]


def test_a_reward_that_falls_quickly_needs_a_witness(tmp_path: Path) -> None:
    rows = dropped(trl_like(np.random.default_rng(0)))[:104]
    alone = watched(rows, tmp_path / "alone")
    assert "reward_drop" in {f.rule for f in alone[-1].findings if f.alone}
    assert "critical" not in {severity for _, _, severity in told(alone)}
    assert done(alone) == []
    torn = [row if n < 100 else {**row, "grad_norm": 20 * row["grad_norm"]} for n, row in enumerate(rows)]
    seen = watched(torn, tmp_path / "torn")
    assert done(seen)[0][1] == "rollback"
    assert seen[done(seen)[0][0]].actions[-1].rule == "reward_drop"


def test_a_reward_that_stays_down_is_acted_on_by_itself(tmp_path: Path) -> None:
    verdicts = watched(dropped(trl_like(np.random.default_rng(0)))[:125], tmp_path)
    step, action = done(verdicts)[0]
    assert action == "rollback"
    assert 105 <= step < 115
    back = verdicts[step].rolled_back_to
    assert back is not None
    assert back < 100


@pytest.mark.parametrize("band", [6.0, 12.0, 25.0])
def test_a_documented_band_is_a_warning_alone_and_acts_beside_a_falling_reward(band: float, tmp_path: Path) -> None:
    rows = [{**row, "log_ratio": 0.2 if n < 100 else band} for n, row in enumerate(trl_like(np.random.default_rng(0)))]
    alone = watched(rows[:130], tmp_path / "alone")
    severity = "warning" if band > 20 else "notice"
    assert {(f.rule, f.severity) for f in alone[-1].findings if f.rule == "log_ratio"} == {("log_ratio", severity)}
    assert done(alone) == []
    controls = FakeControls()
    with gw.Watchdog(BOOK, controls=controls, run_dir=tmp_path / "beside") as dog:
        verdicts = [dog.observe(step, row) for step, row in enumerate(dropped(rows)[:106])]
    assert done(verdicts) != []
    before = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    assert controls.settings["learning_rate"] <= before["learning_rate"]
    assert controls.settings["kl_coef"] >= before["kl_coef"]


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────
LEVELS = {  # not step_kl and param_change: with one of them reward_step can tell that the policy had not changed
    "entropy": 0.5, "kl": 0.02, "ess": 0.95, "clip_fraction": 0.02, "completion_length": 300.0, "mean_ratio": 1.3,
    "log_ratio": 0.1, "sampler_mismatch": 1e-3, "weights_touched": 0.0,
    "moments_touched": 0.0, "reference_touched": 0.0, "vetoes": 0.0, "truncated_fraction": 0.1, "param_drift": 0.01,
    "grad_norm_limit": 1.0, "min_ratio": 0.8, "max_ratio": 1.3, "kl_coef_set": 0.1, "clip_epsilon_set": 0.2,
    "mean_log_prob_current": -30.0, "std_advantage": 0.9, "mean_abs_advantage": 0.7, "group_std_reward": 0.2,
}  # fmt: skip


def decisions(rows: Rows) -> list[tuple[str, bool, list[str]]]:
    """What was decided on each step, without what is only listed."""
    dog = gw.Watchdog(BOOK, controls=FakeControls(restorable=False))
    verdicts = [dog.observe(step, row) for step, row in enumerate(rows)]
    return [(v.level, v.halt, [a.action for a in v.actions]) for v in verdicts]


@given(
    st.sampled_from([*range(len(CASES)), -1]), st.sets(st.sampled_from(sorted(LEVELS)), max_size=6), st.floats(0.9, 1)
)
@settings(max_examples=30)
def test_a_metric_that_stands_still_changes_no_decision(which: int, names: set[str], scale: float) -> None:
    case = CASES[which]
    rows = broken(case) if which >= 0 else trl_like(np.random.default_rng(0))[:66]
    new = {name: scale * LEVELS[name] for name in names if not any(name in row for row in rows)}
    assert decisions([{**row, **new} for row in rows]) == decisions(rows)


def test_the_levels_above_are_of_metrics_that_there_are() -> None:
    assert set(LEVELS) <= set(METRICS)


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_observation_is_cheap() -> None:
    rows = ddpo_like(np.random.default_rng(0))
    dog = gw.Watchdog(BOOK)
    taken = []
    for step, row in enumerate(rows):
        begun = time.perf_counter()
        dog.observe(step, row)
        taken.append(time.perf_counter() - begun)
    assert statistics.median(taken) < 400e-6  # [s]
