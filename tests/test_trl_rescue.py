"""A tiny real trl.GRPOTrainer and faults: ruined or dead unwatched, as good as healthy with one line more."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "trl_rescue.py"
FAULTS = ("lr", "nan", "weights")
LONG, SHORT = (200, 60), (120, 50)  # steps, and the fault's
EVERY = [
    pytest.param("lr", 0, False, SHORT),
    *(
        pytest.param(fault, seed, lora, LONG, marks=pytest.mark.slow)
        for lora in (False, True)
        for seed in range(3)
        for fault in FAULTS
    ),
]


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_rescue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def healthy(seed: int, *, lora: bool, steps: int) -> float:
    reward: float = script().run(None, seed=seed, lora=lora, steps=steps).reward
    return reward


@pytest.mark.parametrize(("fault", "seed", "lora", "when"), EVERY)
def test_what_ruins_a_run_costs_a_watched_one_less_than_a_tenth(
    fault: str, seed: int, when: tuple[int, int], *, lora: bool
) -> None:
    steps, at = when
    usual = healthy(seed, lora=lora, steps=steps)
    assert usual > 0.8
    rescued = script().run(fault, seed=seed, lora=lora, rules="guarded", steps=steps, at=at)
    assert rescued.died is None
    assert rescued.reward >= 0.9 * usual, rescued.done
    back = [done for done in rescued.done if " rollback to " in done]
    assert len(back) == (0 if fault == "nan" else 1), rescued.done  # what is skipped need not be undone
    if fault != "weights":  # training grows out of noise as large as the weights, sooner or later
        ruined = script().run(fault, seed=seed, lora=lora, steps=steps, at=at)
        assert ruined.died == at + 2 if fault == "nan" else ruined.reward < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_healthy_run_is_the_same_watched_to_the_last_bit(*, lora: bool) -> None:
    watched = script().run(None, seed=0, lora=lora, rules="guarded")
    assert watched.done == ()
    assert watched.reward == healthy(0, lora=lora, steps=200)
