"""The document's thresholds, ranges and targets, copied by hand from it and held against what `observe` does.

A mistake in rules/documented.yaml is a failure here.
"""

import math
from itertools import chain
from pathlib import Path

import pytest

import grpo_watchdog as gw
from fake_run import Config, FakeControls

INF, NAN = math.inf, math.nan
BOOK = gw.load("documented")  # read once; the tests look at what it does

# What to do, on the absolute log-ratio difference: ceiling of the learning rate, floor of KL, ceiling of the clip.
FIRST = {"learning_rate": 1e-6, "kl_coef": 0.5, "clip_epsilon": 0.2}
SECOND = {"learning_rate": 5e-7, "kl_coef": 1.0, "clip_epsilon": 0.1}
THIRD = {"learning_rate": 1e-7, "kl_coef": 2.0, "clip_epsilon": 0.2}
BASE = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}

EDGES = [
    (0.0, "ok", BASE),
    (1.67, "ok", BASE),
    (math.nextafter(5, 0), "ok", BASE),
    (5.0, "warning", FIRST),
    (math.nextafter(5, 9), "warning", FIRST),
    (math.nextafter(10, 0), "warning", FIRST),
    (10.0, "warning", SECOND),
    (math.nextafter(10, 11), "warning", SECOND),
    (math.nextafter(20, 0), "warning", SECOND),
    (20.0, "warning", SECOND),
    (math.nextafter(20, 21), "critical", THIRD),
    (94037.0, "critical", THIRD),
    (197562.5312, "critical", THIRD),
    (1e308, "critical", THIRD),
]
SIGNED = list(
    chain(
        ((sign * size, level, knobs) for size, level, knobs in EDGES for sign in (1, -1)),
        ((odd, "critical", THIRD) for odd in (NAN, INF, -INF)),
    )
)

RANGES = {
    "loss": (-10, 10, "warning"),
    "policy_loss": (-1, 1, "warning"),
    "kl_penalty": (-1, 1, "warning"),
    "mean_advantage": (-1, 1, "warning"),
    "mean_log_prob_current": (-1e6, 1e6, "notice"),
    "mean_log_prob_ref": (-1e6, 1e6, "notice"),
    "mean_reward": (0, 1, "warning"),
    "std_reward": (0, 0.5, "warning"),
}

CAUSES = {
    "log_ratio": [
        "learning_rate_too_high", "kl_coef_too_small", "too_many_steps", "reference_not_frozen",
        "more_than_lora_trained", "abnormal_parameters", "trajectory_mismatch", "missing_limits",
    ],
    "collapse": ["reward_without_discrimination", "identical_samples"],
}  # fmt: skip

INCIDENT = {
    "loss": 171551552.0,
    "policy_loss": 171531792.0,
    "kl_penalty": 197562.5312,
    "mean_ratio": 485165216.0,
    "mean_advantage": 0.0,
    "mean_log_prob_current": -833610.3125,
    "mean_log_prob_ref": -1031172.8750,
    "mean_reward": 0.4971,
    "std_reward": 0.1766,
}
NORMAL = {
    "loss": 0.1234,
    "policy_loss": 0.8567,
    "kl_penalty": 0.0045,
    "mean_ratio": 1.0234,
    "mean_advantage": 0.0123,
    "mean_log_prob_current": -256.78,
    "mean_log_prob_ref": -258.45,
    "mean_reward": 0.6234,
    "std_reward": 0.1234,
}


def finding(verdict: gw.Verdict, rule: str) -> gw.Finding | None:
    return next((f for f in verdict.findings if f.rule == rule), None)


def firing(verdict: gw.Verdict) -> set[str]:
    return {f.rule for f in verdict.findings}


@pytest.mark.parametrize(("value", "level", "knobs"), SIGNED)
def test_every_edge_of_the_bands_has_the_documented_level_and_targets(
    value: float, level: str, knobs: dict[str, float]
) -> None:
    config = Config()
    verdict = gw.Watchdog(BOOK, controls=FakeControls(config)).observe(1, {"log_ratio": value})

    assert verdict.level == level
    assert config.now() == knobs
    assert verdict.halt is (level == "critical")  # nothing is proven, so there is nothing to restore
    assert [a.action for a in verdict.actions if a.action == "rollback"] == []


@pytest.mark.parametrize(("value", "level", "knobs"), [row for row in SIGNED if math.isfinite(row[0])])
def test_the_difference_of_the_log_probs_is_the_log_ratio_where_nothing_else_is_said(
    value: float, level: str, knobs: dict[str, float]
) -> None:
    config = Config()
    metrics = {"mean_log_prob_current": value, "mean_log_prob_ref": 0.0}
    verdict = gw.Watchdog(BOOK, controls=FakeControls(config)).observe(1, metrics)

    assert (finding(verdict, "log_ratio") is not None) == (level != "ok")
    assert config.now() == knobs

    config = Config()
    verdict = gw.Watchdog(BOOK, controls=FakeControls(config), ratio_to="old").observe(1, metrics)
    assert finding(verdict, "log_ratio") is None
    assert config.now() == BASE


@pytest.mark.parametrize("scale", [1.0, 30.0, 1 / 30])
@pytest.mark.parametrize(
    ("value", "factors"), [(7.0, (1 / 10, 5, 1)), (15.0, (1 / 20, 10, 0.5)), (25.0, (1 / 100, 20, 1))]
)
def test_scaled_targets_take_the_same_steps_as_factors(
    value: float, factors: tuple[float, float, float], scale: float
) -> None:
    config = Config(1e-5 * scale, 0.1 * scale, 0.2 * scale)
    gw.Watchdog(BOOK, controls=FakeControls(config), targets="scaled").observe(1, {"log_ratio": value})

    expected = [b * scale * f for b, f in zip(BASE.values(), factors, strict=True)]
    assert list(config.now().values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [7.0, 15.0, 25.0])
def test_a_run_that_is_safer_than_the_targets_is_left_as_it_is(value: float) -> None:
    config = Config(learning_rate=5e-8, kl_coef=3.0, clip_epsilon=0.05)
    gw.Watchdog(BOOK, controls=FakeControls(config)).observe(1, {"log_ratio": value})

    assert config == Config(learning_rate=5e-8, kl_coef=3.0, clip_epsilon=0.05)


@pytest.mark.parametrize("metric", RANGES)
def test_every_range_includes_its_ends_and_nothing_beyond(metric: str) -> None:
    low, high, level = RANGES[metric]
    rule = metric.removeprefix("mean_") if "log_prob" in metric else metric
    inside = [low, high, (low + high) / 2]
    outside = [math.nextafter(low, -INF), math.nextafter(high, INF)]
    for value in inside:
        assert finding(gw.Watchdog(BOOK).observe(1, {metric: value}), rule) is None, value
    for value in outside:
        config = Config()
        verdict = gw.Watchdog(BOOK, controls=FakeControls(config)).observe(1, {metric: value})
        found = finding(verdict, rule)
        assert found is not None, value
        assert found.severity == level
        assert config.now() == BASE  # reading 8: no dose by themselves
        assert not verdict.halt


@pytest.mark.parametrize("metric", [*RANGES, "mean_ratio", "log_ratio"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_counts_as_the_third_band_whatever_it_is(metric: str, value: float) -> None:
    config = Config()
    verdict = gw.Watchdog(BOOK, controls=FakeControls(config)).observe(1, {metric: value})

    assert verdict.level == "critical"
    assert config.now() == THIRD
    assert verdict.halt
    assert len(verdict.incidents) == 1


@pytest.mark.parametrize(("value", "bad"), [(0.5, False), (2.0, False), (math.nextafter(0.5, 0), True),
                                            (math.nextafter(2, 3), True), (1.0, False), (0.0, True)])  # fmt: skip
def test_a_ratio_outside_half_to_two_is_a_warning_after_three_steps_and_shrinks_the_clip(
    value: float,
    bad: bool,  # noqa: FBT001
) -> None:
    config = Config()
    dog = gw.Watchdog(BOOK, controls=FakeControls(config))
    for step in (1, 2):
        assert dog.observe(step, {"mean_ratio": value}).level == "ok"
        assert config.now() == BASE

    assert dog.observe(3, {"mean_ratio": value}).level == ("warning" if bad else "ok")
    assert config.now() == {**BASE, "clip_epsilon": 0.1 if bad else 0.2}


def test_a_log_ratio_band_explains_the_ratio_and_leaves_the_clip_as_the_band_says() -> None:
    config = Config()
    dog = gw.Watchdog(BOOK, controls=FakeControls(config))
    for step in range(5):
        verdict = dog.observe(step, {"log_ratio": 6.0, "mean_ratio": math.exp(6.5)})

    found = finding(verdict, "mean_ratio")
    assert found is not None
    assert found.inhibited_by == "log_ratio"
    assert config.now() == FIRST


def test_the_incident_is_one_critical_incident_on_its_first_step() -> None:
    config = Config()
    verdict = gw.Watchdog(BOOK, controls=FakeControls(config)).observe(0, INCIDENT)

    assert verdict.level == "critical"
    assert verdict.halt
    assert verdict.rolled_back_to is None
    assert config.now() == THIRD
    assert [i.rule for i in verdict.incidents] == ["log_ratio"]
    evidence = {f.rule: f for f in verdict.incidents[0].evidence}
    assert evidence["log_ratio"].value > 20
    assert "exp(20)" in evidence["saturation"].note
    assert {"loss", "policy_loss", "kl_penalty"} <= evidence.keys()
    assert {c.cause for c in verdict.incidents[0].causes} == set(CAUSES["log_ratio"])
    assert "collapse" not in firing(verdict)
    assert finding(verdict, "zero_advantage") is not None
    assert {"mean_reward", "std_reward", "mean_advantage", "advantage_bias"}.isdisjoint(firing(verdict))


def test_the_incident_is_halted_with_checkpoints_at_hand_that_are_not_proven(tmp_path: Path) -> None:
    with gw.Watchdog(BOOK, controls=FakeControls(Config()), run_dir=tmp_path) as dog:
        dog.checkpoint(0)
        verdict = dog.observe(1, INCIDENT)

    assert verdict.halt
    assert "no checkpoint is proven" in dog.halted


def test_the_causes_are_the_documents_in_its_order_where_nothing_speaks_for_one() -> None:
    verdict = gw.Watchdog(BOOK, ratio_to="old").observe(0, {"log_ratio": 30.0})
    assert [c.cause for c in verdict.incidents[0].causes] == CAUSES["log_ratio"]


def test_the_learning_rate_and_the_kl_coefficient_of_the_document_speak_for_its_first_causes() -> None:
    verdict = gw.Watchdog(BOOK, controls=FakeControls(Config())).observe(0, INCIDENT)

    causes = verdict.incidents[0].causes
    assert [c.cause for c in causes[:2]] == ["learning_rate_too_high", "kl_coef_too_small"]
    assert all(c.supported and not c.contradicted for c in causes[:2])


def test_the_normal_row_raises_no_warning_however_long_it_goes_on() -> None:
    config = Config()
    dog = gw.Watchdog(BOOK, controls=FakeControls(config))
    for step in range(200):
        verdict = dog.observe(step, NORMAL)
        assert verdict.level in ("ok", "notice"), verdict
        assert not verdict.incidents
        assert not verdict.actions
    assert config.now() == BASE


@pytest.mark.parametrize("shown", [
    {"std_reward": 0.0}, {"zero_std_fraction": 1.0}, {"zero_std_fraction": 0.99}, {"std_advantage": 0.0},
    {"mean_abs_advantage": 0.0}, {"group_std_reward": 0.0},
])  # fmt: skip
def test_zero_advantage_is_a_collapse_only_with_a_sign_of_it_over_a_window(shown: dict[str, float]) -> None:
    dog = gw.Watchdog(BOOK)
    for step in range(4):
        assert dog.observe(step, {"mean_advantage": 0.0, **shown}).level == "notice"
    verdict = dog.observe(4, {"mean_advantage": 0.0, **shown})

    assert verdict.level == "warning"
    assert [i.rule for i in verdict.incidents] == ["collapse"]
    assert [c.cause for c in verdict.incidents[0].causes] == CAUSES["collapse"] or "zero_std_fraction" in shown


def test_zero_advantage_alone_is_a_notice_and_the_collapse_rule_says_that_it_is_blind() -> None:
    dog = gw.Watchdog(BOOK)
    for step in range(50):
        verdict = dog.observe(step, {"mean_advantage": 0.0})
    assert verdict.level == "notice"
    assert firing(verdict) == {"zero_advantage"}
    assert "collapse" in {b.rule for b in dog.blind()}


@pytest.mark.parametrize(
    ("value", "rule"), [(0.0, "zero_advantage"), (5e-5, "zero_advantage"), (-5e-5, "zero_advantage"),
                        (1e-4, None), (1.001e-4, "advantage_bias"), (-0.5, "advantage_bias")],
)  # fmt: skip
def test_a_mean_advantage_that_exact_normalisation_cannot_give_is_noticed(value: float, rule: str | None) -> None:
    verdict = gw.Watchdog(BOOK).observe(0, {"mean_advantage": value})
    assert firing(verdict) == ({rule} if rule else set())
    assert verdict.level == ("notice" if rule else "ok")


@pytest.mark.parametrize("clamped", [math.exp(20), 485165216.0, math.exp(10), math.exp(-20), math.exp(-10), 1e4, 1e-4])
def test_a_ratio_on_a_clamp_is_saturated_and_not_believed(clamped: float) -> None:
    config = Config()
    dog = gw.Watchdog(BOOK, controls=FakeControls(config))
    for step in range(5):
        verdict = dog.observe(step, {"mean_ratio": clamped, "log_ratio": 0.0})

    assert [i.rule for i in verdict.incidents] == ["saturation"]
    assert config.now() == BASE  # the log-ratio is what is acted on, and it is calm


def test_a_ratio_below_its_own_log_ratio_breaks_jensen_and_is_said() -> None:
    verdict = gw.Watchdog(BOOK).observe(0, {"mean_ratio": 1.0234, "log_ratio": 1.67})
    found = finding(verdict, "saturation")
    assert found is not None
    assert (found.severity, "Jensen" in found.note) == ("notice", True)


def test_the_kl_coefficient_inferred_in_the_incident_is_a_tenth() -> None:
    inferred = (INCIDENT["loss"] - INCIDENT["policy_loss"]) / INCIDENT["kl_penalty"]
    assert inferred == pytest.approx(0.1, rel=1e-3)


def test_a_change_of_the_inferred_coefficient_that_nobody_announced_is_a_notice() -> None:
    dog = gw.Watchdog(BOOK)
    for step in range(30):
        beta = 0.1 if step < 20 else 0.3
        row = {"loss": 0.25 + beta * 0.5, "policy_loss": 0.25, "kl_penalty": 0.5}
        verdict = dog.observe(step, row)
        assert (finding(verdict, "loss_weight") is not None) == (step >= 22), step
    assert verdict.level == "notice"


def test_the_page_carries_the_documents_remedies_in_both_languages() -> None:
    book = BOOK
    said = " ".join(
        text for cause in book.causes.values() for text in (cause.remedy.en, cause.remedy.zh, cause.title.zh)
    )
    numbers = ["1e-6", "5e-7", "1e-7", "0.5", "1.0", "2.0", "[-10, 10]", "[1e-4, 1e4]", "LoRA", "requires_grad"]
    words = ["学习率", "KL 惩罚", "参考模型", "轨迹", "梯度裁剪", "检查点", "区分度", "归一化", "监控"]
    assert [wanted for wanted in (*numbers, *words) if wanted not in said] == []
    for rule_id, rule in book.rules.items():
        assert rule.title.en, rule_id
        assert any("一" <= letter <= "鿿" for letter in rule.title.zh), rule_id
        assert rule.examples, rule_id
        assert "reading" in rule.source or "指标含义" in rule.source, rule_id
    advice = book.rules["log_ratio"].ladder[1].advice
    assert advice is not None
    assert "group size 2" in advice.en
    assert "0.707" in advice.zh


def test_base_is_the_documents() -> None:
    base = BOOK.base
    assert (base.learning_rate, base.kl_coef, base.clip_epsilon) == (1e-5, 0.1, 0.2)


@pytest.mark.parametrize("metric", ["mean_ratio", *RANGES])
def test_the_table_of_metrics_states_the_same_ranges(metric: str) -> None:
    assert gw.METRICS[metric].normal == ((0.5, 2) if metric == "mean_ratio" else RANGES[metric][:2])
    assert gw.METRICS[metric].source == "document"
