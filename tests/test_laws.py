"""Laws: what holds for every sequence of inputs, whoever sends them."""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from fake_run import KNOBS, Config, FakeControls
from grpo_watchdog.controls import DialKnob
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import from_json

BOOK = gw.load("documented")
WATCHED = ["loss", "policy_loss", "kl_penalty", "mean_ratio", "mean_advantage", "mean_log_prob_current",
           "mean_log_prob_ref", "mean_reward", "std_reward", "log_ratio", "zero_std_fraction", "kl_coef"]  # fmt: skip

finite = st.floats(allow_nan=False, allow_infinity=False)
telling = st.sampled_from([0.0, 0.1, 0.5, 1.0, 4.0, 5.0, -6.0, 8.0, 10.0, -12.0, 20.0, 25.0, 485165216.0, 1e-4, -1e6])
number = st.one_of(telling, st.floats())
junk = st.one_of(st.none(), st.text(max_size=3), st.lists(st.floats(), max_size=2), st.booleans(), st.integers(),
                 st.just(10**400), st.just(-(10**400)), st.complex_numbers(), st.binary(max_size=2))  # fmt: skip
row = st.dictionaries(st.sampled_from(WATCHED), number, max_size=6)
tame_row = st.dictionaries(st.sampled_from(WATCHED), telling, max_size=6)
wild_row = st.dictionaries(
    st.one_of(st.sampled_from(WATCHED), st.text(max_size=4), st.integers(), st.none()),
    st.one_of(number, number, junk), max_size=6,
)  # fmt: skip
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

# Options under which everything happens within a short sequence.
HASTY: dict[str, Any] = {
    "recover_after": 2, "cooldown": 1, "effect_within": 2, "probation": 1, "checkpoint_every": 2, "recur_within": 3,
    "rollback_budget": 2,
}  # fmt: skip
CALM = {"log_ratio": 0.0, "loss": 0.1, "mean_ratio": 1.0, "mean_reward": 0.5, "std_reward": 0.1, "policy_loss": 0.1,
        "kl_penalty": 0.0, "mean_advantage": 0.0, "zero_std_fraction": 0.1}  # fmt: skip


@contextmanager
def watching(config: Config, *, rollback: bool, **policy: Any) -> Iterator[gw.Watchdog]:
    """A watchdog on a fake run, with or without somewhere to roll back to."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run" if rollback else None
        with gw.Watchdog(BOOK, FakeControls(config), run_dir, **{**HASTY, **policy}) as dog:
            yield dog


def failed(verdict: gw.Verdict) -> list[str]:
    return [text for text in verdict.notices if "the watchdog failed" in text]


def strict(value: object) -> str:
    """A verdict as text in which not-a-number equals itself."""
    return repr(value)


def rank_of(value: float) -> tuple[int, int]:
    verdict = gw.Watchdog(BOOK).observe(0, {"log_ratio": value})
    return RANK[verdict.level], max((f.rank for f in verdict.findings if f.rule == "log_ratio"), default=0)


@given(number, number)
@example(5.0, -5.0)
@example(20.0, math.nextafter(20.0, 21.0))
def test_severity_rises_with_the_size_of_the_log_ratio(first: float, second: float) -> None:
    near, far = sorted((first, second), key=lambda x: math.inf if math.isnan(x) else abs(x))

    assert rank_of(near) <= rank_of(far)
    if math.isfinite(first):
        assert rank_of(first) == rank_of(-first)


odd_step = st.one_of(st.integers(), st.none(), st.floats(), st.text(max_size=2))
user_sets = st.tuples(
    st.sampled_from(KNOBS), st.sampled_from([1e-8, 1e-7, 1e-6, 1e-5, 3e-4, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 9.0])
)
moves = st.lists(
    st.one_of(wild_row, tame_row, tame_row, tame_row, user_sets, user_sets, st.just("calm"), st.just("calm")),
    max_size=30,
)


def safe(name: str, now: float, own: float) -> bool:
    return now >= own if name == "kl_coef" else now <= own


@quick
@given(moves, st.sampled_from(["watch", "rollback"]), st.sampled_from(["absolute", "scaled"]))
@example([{"log_ratio": 6.0}, ("kl_coef", 0.5), *["calm"] * 12], "watch", "absolute")  # the very number it is held at
@example([*["calm"] * 6, {"log_ratio": 25.0}, ("learning_rate", 3e-4), *["calm"] * 20], "rollback", "absolute")
def test_nothing_ever_turns_a_knob_beyond_what_the_user_set(sequence: list[Any], mode: str, targets: str) -> None:
    config = Config()
    own = config.now()
    with watching(config, rollback=mode == "rollback", targets=targets) as dog:
        for step, move in enumerate([*sequence, *["calm"] * 4]):
            if isinstance(move, tuple):
                own[move[0]] = float(repr(move[1]))  # an object of the user's own
                setattr(config, move[0], own[move[0]])
                continue
            verdict = dog.observe(step, CALM if move == "calm" else move)
            assert not failed(verdict)
            for name, now in config.now().items():
                assert safe(name, now, own[name]), (name, now, own[name])
        patience = 64 * int(HASTY["recover_after"]) + 40
        for step in range(1000, 1000 + patience):
            if config.now() == own or dog.halted:
                break
            dog.observe(step, CALM)
        event(f"halted: {bool(dog.halted)}")
        if not dog.halted:
            assert config.now() == own


@quick
@given(st.lists(row, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_neither_the_order_of_rules_nor_of_metrics_matters(rows: list[dict[str, float]], rng: random.Random) -> None:
    whole = json.loads(BOOK.as_json())
    for part in ("rules", "causes"):
        items = list(whole[part].items())
        rng.shuffle(items)
        whole[part] = dict(items)
    other = from_json(whole)
    assert other.digest == BOOK.digest

    here, there = Config(), Config()
    first, second = gw.Watchdog(BOOK, FakeControls(here), **HASTY), gw.Watchdog(other, FakeControls(there), **HASTY)
    for step, metrics in enumerate(rows):
        items = list(metrics.items())
        rng.shuffle(items)
        assert strict(first.observe(step, metrics)) == strict(second.observe(step, dict(items)))
        assert here == there
    assert first.blind() == second.blind()


@quick
@given(st.lists(st.tuples(odd_step, wild_row), max_size=12), st.booleans())
def test_nothing_that_is_sent_makes_it_raise_or_fail(sent: list[tuple[Any, dict[Any, Any]]], rollback: bool) -> None:  # noqa: FBT001
    with watching(Config(), rollback=rollback) as dog:
        for step, metrics in sent:
            verdict = dog.observe(step, metrics)
            assert not failed(verdict), verdict
            assert verdict.level in RANK
            assert type(verdict.step) is int
        json.dumps(dog.state_dict())


def without(metrics: Mapping[str, float], rule: str) -> dict[str, float]:
    """The same metrics without those that a rule needs."""
    needs: dict[str, tuple[str, ...]] = {
        "log_ratio": ("log_ratio", "mean_log_prob_current", "mean_log_prob_ref"), "mean_ratio": ("mean_ratio",),
        "collapse": ("zero_std_fraction", "std_reward"), "saturation": ("mean_ratio",), "loss": ("loss",),
        "zero_advantage": ("mean_advantage",),
    }  # fmt: skip
    return {name: value for name, value in metrics.items() if name not in needs[rule]}


@quick
@given(st.sampled_from(["log_ratio", "mean_ratio", "collapse", "saturation", "loss", "zero_advantage"]),
       st.lists(row, max_size=8), st.lists(row, min_size=1, max_size=20))  # fmt: skip
def test_a_rule_whose_metric_is_missing_neither_fires_nor_resolves(
    rule: str, before: list[dict[str, float]], after: list[dict[str, float]]
) -> None:
    dog = gw.Watchdog(BOOK, **HASTY)
    step, verdict = 0, None
    for step, metrics in enumerate(before):
        verdict = dog.observe(step, metrics)
    held = {f.rule: f.rank for f in verdict.findings} if verdict else {}
    for metrics in after:
        step += 1
        now = {f.rule: f.rank for f in dog.observe(step, without(metrics, rule)).findings}
        assert now.get(rule) == held.get(rule)


@quick
@given(st.lists(row, max_size=10), st.lists(row, min_size=1, max_size=10), st.booleans())
def test_a_state_put_back_goes_on_as_if_nothing_had_been(
    before: list[dict[str, float]],
    after: list[dict[str, float]],
    through_json: bool,  # noqa: FBT001
) -> None:
    here, there = Config(), Config()
    controls = FakeControls(here)
    first = gw.Watchdog(BOOK, controls, **HASTY)
    for step, metrics in enumerate(before):
        first.observe(step, metrics)
    state = first.state_dict()
    if through_json:
        state = json.loads(json.dumps(state))
    frozen = json.dumps(state, sort_keys=True)

    there.__dict__.update(here.__dict__)
    second = gw.Watchdog(BOOK, _continued(controls, there), **HASTY)
    second.load_state_dict(state)
    assert json.dumps(second.state_dict(), sort_keys=True) == frozen
    for step, metrics in enumerate(after, start=len(before)):
        assert strict(first.observe(step, metrics)) == strict(second.observe(step, metrics))
        assert json.dumps(first.state_dict(), sort_keys=True) == json.dumps(second.state_dict(), sort_keys=True)
    assert here == there
    assert first.blind() == second.blind()
    assert json.dumps(state, sort_keys=True) == frozen  # what was handed over is nobody's to write in


def _continued(controls: FakeControls, config: Config) -> FakeControls:
    """Controls over another config whose knobs are held as those of the first are."""
    twin = FakeControls(config)
    for name, knob in twin.knobs.items():
        original = controls.knobs[name]
        mine = {k: v for k, v in vars(original).items() if k not in ("_dial", "where")}
        vars(knob).update(mine)
    return twin


@quick
@given(st.lists(wild_row, max_size=10), st.booleans())
def test_halted_stays_halted(rows: list[dict[Any, Any]], rollback: bool) -> None:  # noqa: FBT001
    config = Config()
    with watching(config, rollback=rollback, on_divergence="halt") as dog:
        assert dog.observe(0, {"log_ratio": 21.0}).halt
        why, knobs = dog.halted, config.now()
        for step, metrics in enumerate(rows, start=1):
            verdict = dog.observe(step, metrics)
            assert verdict.halt
            assert not [a for a in verdict.actions if a.ok]
            assert dog.halted == why
        for step in range(100, 120):
            assert dog.observe(step, {"log_ratio": 0.0}).halt
        assert config.now() == knobs


class Stubborn:
    """A controller that writes its own coefficient on every step, as adaptive KL controllers do."""

    def __init__(self, config: Config, follow: Callable[[float], float]) -> None:
        self.config, self.follow = config, follow
        self.last = config.kl_coef

    def step(self) -> None:
        self.last = self.config.kl_coef = self.follow(self.config.kl_coef)


@quick
@given(st.floats(0.3, 1.5), st.integers(1, 12))
def test_an_adaptive_controller_is_kept_at_the_floor_and_gets_its_own_value_back(factor: float, steps: int) -> None:
    config = Config()
    own = Stubborn(config, lambda _: 0.1 * factor)
    with watching(config, rollback=False, effect_within=50) as dog:
        dog.observe(0, {"log_ratio": 6.0})
        for step in range(1, steps + 1):
            own.step()
            dog.observe(step, {"log_ratio": 6.0})
            assert config.kl_coef >= 0.5
        for step in range(steps + 1, steps + 12):
            dog.observe(step, {"log_ratio": 0.0})
        assert config.kl_coef == own.last


@quick
@given(st.lists(st.sampled_from([1.0, 3.0, 0.2]), max_size=25))
@example([3.0, 3.0, 1.0, 3.0])
def test_a_rule_fires_after_its_consecutive_observations_and_stops_after_its_own(ratios: list[float]) -> None:
    rule = BOOK.rules["mean_ratio"]
    dog = gw.Watchdog(BOOK)
    bad = good = 0
    firing = False
    for step, ratio in enumerate(ratios):
        bad, good = (0, good + 1) if ratio == 1.0 else (bad + 1, 0)
        firing = bad >= rule.for_ or (firing and good < rule.keep_firing_for)
        verdict = dog.observe(step, {"mean_ratio": ratio})
        assert ("mean_ratio" in {f.rule for f in verdict.findings}) == firing


def test_a_release_that_fails_is_tried_again() -> None:
    config, stuck = Config(), [False]

    def write(value: float) -> None:
        if stuck[0]:
            raise RuntimeError("busy")
        config.kl_coef = value

    controls = FakeControls(config)
    controls.knobs = {"kl_coef": DialKnob(gw.Dial(lambda: config.kl_coef, write, "kl"), "max")}
    dog = gw.Watchdog(BOOK, controls, **{**HASTY, "effect_within": 500})
    dog.observe(0, {"log_ratio": 6.0})
    assert config.kl_coef == 0.5
    stuck[0] = True
    for step in range(1, 20):
        dog.observe(step, {"log_ratio": 0.0})
    stuck[0] = False
    for step in range(20, 60):
        dog.observe(step, {"log_ratio": 0.0})
    assert config.kl_coef == 0.1
