"""Knobs that need no trainer: what can be turned, what is held, what comes back."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.controls import DialKnob, NoControls, dial


@dataclass(frozen=True)
class Frozen:
    beta: float = 0.1


class Row(NamedTuple):
    beta: float = 0.1


class Derived:
    """Stores a tenth of what it shows."""

    def __init__(self) -> None:
        self._tenth = 0.01

    @property
    def beta(self) -> float:
        return self._tenth * 10

    @beta.setter
    def beta(self, value: float) -> None:
        self._tenth = value / 10

    @property
    def fixed(self) -> float:
        return 0.1

    @property
    def broken(self) -> float:
        raise RuntimeError("not ready")


def knob(spec: Any, safe: Literal["min", "max"] = "max") -> DialKnob:  # noqa: ANN401
    return DialKnob(dial(spec, "kl_coef"), safe)


# ── what can be turned ────────────────────────────────────────────────────────────────────────────────────────────
def places() -> list[tuple[str, gw.Dial, Callable[[], float]]]:
    """Every kind of place, with a way to look at it that does not go through the dial."""
    space, table, derived = SimpleNamespace(beta=0.1), {"beta": 0.1}, Derived()
    whole, mixed = SimpleNamespace(beta=0), SimpleNamespace(beta=np.float32(0.1))
    tensor = SimpleNamespace(beta=torch.tensor(0.1, dtype=torch.float64))
    leaf = {"beta": torch.nn.Parameter(torch.tensor(0.1))}
    array = SimpleNamespace(beta=np.array(0.1))
    pair = [0.1]
    return [
        ("attr", gw.attr(space, "beta"), lambda: float(space.beta)),
        ("item", gw.item(table, "beta"), lambda: table["beta"]),
        ("property", gw.attr(derived, "beta"), lambda: derived.beta),
        ("int", gw.attr(whole, "beta"), lambda: float(whole.beta)),
        ("numpy", gw.attr(mixed, "beta"), lambda: float(mixed.beta)),
        ("tensor", gw.attr(tensor, "beta"), lambda: float(tensor.beta)),
        ("parameter", gw.item(leaf, "beta"), leaf["beta"].item),
        ("array", gw.attr(array, "beta"), lambda: float(array.beta)),
        ("pair", dial((lambda: pair[0], lambda value: pair.__setitem__(0, value)), "kl_coef"), lambda: pair[0]),
    ]


@pytest.mark.parametrize(("spec", "look"), [(s, look) for _, s, look in places()], ids=[n for n, _, _ in places()])
def test_a_floor_holds_and_lifts_exactly(spec: gw.Dial, look: Callable[[], float]) -> None:
    first = look()
    turned = knob(spec)
    assert (turned.read(), turned.base(), look()) == (first, first, first)

    turned.hold(0.5)
    assert look() == turned.read() == 0.5
    assert turned.check() is None
    turned.hold(1.0)
    assert look() == 1.0
    turned.hold(0.25)
    assert look() == 0.25
    turned.release()
    assert look() == first
    assert turned.base() == first
    assert turned.check() is None
    turned.release()
    assert look() == first


def test_an_int_is_an_int_again_and_is_not_touched_at_attach() -> None:
    config = SimpleNamespace(beta=2)
    turned = knob(gw.attr(config, "beta"))
    assert type(config.beta) is int
    turned.hold(3.5)
    turned.release()
    assert (config.beta, type(config.beta)) == (2, int)


def test_a_tensor_is_filled_in_place_wherever_else_it_is_held() -> None:
    beta = torch.tensor(0.1)
    config, elsewhere = SimpleNamespace(beta=beta), beta
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.7)
    assert elsewhere.item() == pytest.approx(0.7)
    assert turned.check() is None  # the rounding of float32 is nobody's overwriting
    turned.release()
    assert elsewhere.item() == torch.tensor(0.1).item()
    assert config.beta is beta


def test_a_pair_that_hands_out_its_own_tensor_does_not_lose_the_users_value() -> None:
    beta = torch.tensor(0.1, dtype=torch.float64)
    turned = knob((lambda: beta, beta.fill_))
    turned.hold(0.5)
    assert beta.item() == 0.5
    turned.release()
    assert beta.item() == 0.1


@pytest.mark.parametrize(("make", "said"), [
    (lambda: gw.attr(SimpleNamespace(), "beta"), "has no attribute 'beta'"),
    (lambda: gw.attr(Derived(), "broken"), "not ready"),
    (lambda: gw.item({"epsilon": 0.2}, "beta"), "no item 'beta'; there is 'epsilon'"),
    (lambda: dial(gw.attr(Frozen(), "beta"), "kl_coef"), r"kl_coef \(Frozen.beta\) cannot be turned"),
    (lambda: dial(gw.attr(Row(), "beta"), "kl_coef"), "cannot be turned"),
    (lambda: dial(gw.attr(Derived(), "fixed"), "kl_coef"), "cannot be turned"),
    (lambda: dial(gw.item(MappingProxyType({"beta": 0.1}), "beta"), "kl_coef"), "cannot be turned"),  # type: ignore[arg-type]
    (lambda: dial(gw.attr(SimpleNamespace(beta="0.1"), "beta"), "kl_coef"), "cannot be turned"),
    (lambda: dial(gw.attr(SimpleNamespace(beta=None), "beta"), "kl_coef"), "cannot be turned"),
    (lambda: dial(gw.attr(SimpleNamespace(beta=math.nan), "beta"), "kl_coef"), "must be finite"),
    (lambda: dial(gw.attr(SimpleNamespace(beta=torch.tensor(1)), "beta"), "kl_coef"), "holds no fractions"),
    (lambda: dial(gw.attr(SimpleNamespace(beta=np.array(1)), "beta"), "kl_coef"), "holds no fractions"),
    (lambda: dial(gw.attr(SimpleNamespace(beta=torch.ones(2)), "beta"), "kl_coef"), "cannot be turned"),
    (lambda: dial(0.1, "kl_coef"), "a plain number cannot be turned"),  # type: ignore[arg-type]
    (lambda: dial((1, 2), "kl_coef"), "must be gw.attr"),  # type: ignore[arg-type]
    (lambda: dial((lambda: 1 / 0, lambda _: None), "kl_coef"), "division by zero"),
])  # fmt: skip
def test_what_cannot_be_turned_is_refused_at_attach(make: Callable[[], object], said: str) -> None:
    with pytest.raises(gw.ConfigurationError, match=said):
        make()


# ── whoever else writes ───────────────────────────────────────────────────────────────────────────────────────────
def test_a_value_on_the_safe_side_is_left_alone() -> None:
    config = SimpleNamespace(beta=3.0)
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.5)
    assert config.beta == 3.0
    config.beta = 4.0
    assert turned.check() is None
    assert config.beta == 4.0
    turned.release()
    assert config.beta == 4.0


def test_an_overwritten_value_is_held_again_said_and_given_back() -> None:
    config = SimpleNamespace(beta=0.1)
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.5)
    config.beta = 0.2
    said = turned.check()
    assert said == "SimpleNamespace.beta was 0.5 and somebody set it to 0.2: held at 0.5 again"
    assert config.beta == 0.5
    turned.release()
    assert config.beta == 0.2


def test_a_controller_that_overwrites_on_every_step_is_said_less_and_less_often() -> None:
    config = SimpleNamespace(beta=0.1)
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.5)
    said = []
    for step in range(1, 101):
        config.beta = 0.2
        if turned.check():
            said.append(step)
        assert config.beta == 0.5
    assert said == [1, 2, 4, 8, 16, 32, 64]
    turned.release()
    assert config.beta == 0.2


def test_a_user_who_writes_the_very_number_it_is_held_at_keeps_it() -> None:
    config = SimpleNamespace(beta=0.1)
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.5)
    config.beta = float("0.5")
    assert turned.check() is None
    turned.release()
    assert config.beta == 0.5


def test_a_value_written_between_two_doses_is_the_users() -> None:
    config = SimpleNamespace(beta=0.1)
    turned = knob(gw.attr(config, "beta"))
    turned.hold(0.5)
    config.beta = 0.7
    turned.hold(1.0)
    assert config.beta == 1.0
    turned.release()
    assert config.beta == 0.7


def test_not_a_number_is_on_no_safe_side() -> None:
    for safe in ("min", "max"):
        config = SimpleNamespace(beta=0.1)
        turned = knob(gw.attr(config, "beta"), safe)
        config.beta = math.nan
        turned.hold(0.5)
        assert config.beta == 0.5
        config.beta = math.nan
        assert turned.check()
        assert config.beta == 0.5


def test_a_write_that_fails_leaves_the_knob_as_it_was() -> None:
    stuck = [False]
    config = SimpleNamespace(beta=0.1)

    def write(value: float) -> None:
        if stuck[0]:
            raise RuntimeError("stuck")
        config.beta = value

    turned = knob((lambda: config.beta, write))
    stuck[0] = True
    with pytest.raises(RuntimeError, match="stuck"):
        turned.hold(0.5)
    assert turned.check() is None
    stuck[0] = False
    turned.hold(0.5)
    stuck[0] = True
    with pytest.raises(RuntimeError, match="stuck"):
        turned.release()
    stuck[0] = False
    turned.release()
    assert config.beta == 0.1


user_or_watchdog = st.one_of(
    st.tuples(st.just("user"), st.floats(1e-9, 10)), st.tuples(st.just("hold"), st.floats(1e-9, 10)),
    st.tuples(st.sampled_from(["check", "release"]), st.none()),
)  # fmt: skip


@given(st.lists(user_or_watchdog, max_size=30), st.sampled_from(["min", "max"]), st.floats(1e-9, 10))
def test_whatever_happens_it_is_on_the_safe_side_and_the_users_own_comes_back(
    moves: list[tuple[str, float | None]], safe: Literal["min", "max"], first: float
) -> None:
    config, own = SimpleNamespace(beta=first), first
    turned = knob(gw.attr(config, "beta"), safe)
    safest = min if safe == "min" else max
    for move, value in moves:
        if move == "user" and value is not None:
            config.beta = own = value
        elif move == "hold" and value is not None:
            turned.hold(value)
            assert turned.read() == safest(own, value)
        elif move == "check":
            turned.check()
        else:
            turned.release()
            assert config.beta == own
        assert safest(config.beta, own) == config.beta
    turned.release()
    assert config.beta == own


def test_no_controls_offer_nothing() -> None:
    nothing = NoControls()
    assert (dict(nothing.knobs), nothing.restorable, nothing.inspect(), nothing.measure()) == ({}, False, [], {})
