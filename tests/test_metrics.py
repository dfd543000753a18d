"""The intake: whatever a trainer emits becomes finite or non-finite floats, or one clear notice."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_watchdog as gw
from grpo_watchdog.metrics import METRICS, Intake

BOOK = gw.load("documented")


def read(value: object, name: str = "loss") -> tuple[dict[str, float], list[str]]:
    step, notices = Intake().read(1, {name: value})
    assert all(type(v) is float for v in step.values.values())
    return step.values, notices


NUMBERS = [
    (1.5, 1.5), (3, 3.0), (True, 1.0), (False, 0.0), (2**60, 2.0**60), (10**400, math.inf), (-(10**400), -math.inf),
    (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5), (np.float64(1.5), 1.5), (np.float32(0.1), float(np.float32(0.1))),
    (np.float16(0.1), float(np.float16(0.1))), (np.longdouble(2), 2.0), (np.int8(-3), -3.0),
    (np.uint64(2**63), 2.0**63), (np.bool_(True), 1.0), (np.array(2.5), 2.5), (np.array([2.5]), 2.5),  # noqa: FBT003
    (np.array([[7]]), 7.0),
    (math.inf, math.inf), (-math.inf, -math.inf),
]  # fmt: skip


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=lambda value: repr(value)[:20])
def test_numbers_of_every_kind_are_read(value: object, number: float) -> None:
    assert read(value) == ({"loss": number}, [])


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), np.array(math.nan), torch.tensor(math.nan)])
def test_not_a_number_stays_not_a_number(value: object) -> None:
    values, notices = read(value)
    assert math.isnan(values["loss"])
    assert notices == []


DTYPES = [
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
                 "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_tensors_of_one_element_are_read_whatever_their_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert read(torch.ones(shape, dtype=torch.float32).to(dtype)) == ({"loss": 1.0}, [])


def test_a_tensor_that_requires_grad_is_read_and_left_as_it_is() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * 3
    assert read(loss) == ({"loss": 6.0}, [])
    loss.backward()
    assert weight.grad is not None
    with torch.inference_mode():
        inner = torch.tensor(4.0)
    assert read(inner) == ({"loss": 4.0}, [])
    assert read(torch.nn.Parameter(torch.tensor(5.0))) == ({"loss": 5.0}, [])


class Text(str):
    __slots__ = ()


class Raises:
    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("not even that")


class Hides:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name) if name in ("dtype", "size", "item", "items", "shape") else AttributeError(name)


REFUSED = [
    ("0.5", "text ('0.5')"), ("x" * 10_000, "text ('xxxx"), (b"1", "text (b'1')"), (bytearray(b"1"), "text"),
    (Text("1"), "text"), ([1.0], "a list"), ((1.0,), "a tuple"), ({"a": 1}, "a dict"), (object(), "a object"),
    (1 + 2j, "a complex"), (Raises(), "a Raises"), (Hides(), "a Hides"), (np.ones(3), "an array of 3"),
    (np.ones(0), "an array of 0"), (np.array("1.5"), "of type <U3"), (np.array([None]), "of type object"),
    (np.complex64(1), "of type complex64"), (np.datetime64("2020-01-01"), "of type datetime64"),
    (torch.ones(3), "a tensor of shape (3,) and type torch.float32"), (torch.ones(0), "a tensor of shape (0,)"),
    (torch.tensor(1j), "a tensor of shape () and type torch.complex64"),
    (torch.ones((), device="meta"), "a tensor of type torch.float"), (memoryview(b"1"), "text (<memory"),
    (torch.ones(2, 1).to_sparse(), "a tensor of shape (2, 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "said"), REFUSED, ids=lambda value: type(value).__name__)
def test_what_is_not_one_real_number_is_said_once_and_not_watched(value: object, said: str) -> None:
    intake = Intake()
    step, notices = intake.read(1, {"loss": value, "kl": 0.5})
    assert step.values == {"kl": 0.5}
    assert len(notices) == 1
    assert notices[0].startswith("metric loss is ")
    assert said in notices[0]
    assert "watched" in notices[0]
    assert len(notices[0]) < 300
    for number in range(2, 6):
        assert intake.read(number, {"loss": value}) == ((number, {}), [])


def test_none_and_absent_say_nothing() -> None:
    assert read(None) == ({}, [])
    assert Intake().read(0, {}) == ((0, {}), [])


def test_one_bad_tensor_does_not_blind_the_others() -> None:
    metrics = {
        "loss": torch.tensor(1.0), "kl": torch.ones((), device="meta"), "entropy": torch.tensor([[2]]).to_sparse(),
        "grad_norm": torch.tensor(3, dtype=torch.int32), "mean_reward": torch.ones(4),
    }  # fmt: skip
    step, notices = Intake().read(0, metrics)
    assert step.values["loss"] == 1.0
    assert step.values["grad_norm"] == 3.0
    assert "kl" not in step.values
    assert len([n for n in notices if n.startswith(("metric kl ", "metric mean_reward "))]) == 2
    assert set(step.values) | {n.split()[1] for n in notices} == set(metrics)


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_all_tensors_of_a_device_are_brought_over_at_once() -> None:
    names = list(METRICS)[:20]
    metrics = {name: torch.tensor(i, dtype=DTYPES[i % 10]) for i, name in enumerate(names)}
    with Counting() as counting:
        step, notices = Intake().read(0, metrics)

    assert step.values == {name: float(i) for i, name in enumerate(names)}
    assert notices == []
    assert counting.seen.count("stack") == 1
    assert [op for op in counting.seen if op in ("_local_scalar_dense", "item", "is_nonzero", "equal")] == []


def test_floats_touch_no_tensor() -> None:
    with Counting() as counting:
        Intake().read(0, {"loss": 1.0, "kl": 2, "mean_reward": np.float32(1)})
    assert counting.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for_once() -> None:
    metrics = {name: torch.ones((), device="cuda") for name in list(METRICS)[:20]}
    with torch.profiler.profile() as profile:
        Intake().read(0, metrics)
    copies = [event for event in profile.events() or () if "Memcpy DtoH" in event.name]
    assert len(copies) <= 1


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("name", "meant"), [("lose", "loss"), ("meanratio", "mean_ratio"), ("kl_coeff", "kl_coef"),
                                             ("LOSS", None), (3, None), (None, None), (("loss",), "loss")])  # fmt: skip
def test_an_unknown_name_is_said_once_with_what_may_have_been_meant(name: object, meant: str | None) -> None:
    intake = Intake()
    step, notices = intake.read(0, {name: 1.0})
    assert step.values == {}
    assert len(notices) == 1
    assert f"metric {name!r} is not in the table of canonical metrics and is not watched" in notices[0]
    assert ("did you mean " + meant + "?" in notices[0]) if meant else True
    assert intake.read(1, {name: 1.0})[1] == []


def test_names_that_are_strings_by_another_class_are_known() -> None:
    class Name(StrEnum):
        LOSS = "loss"

    step, notices = Intake().read(0, {Name.LOSS: 1.0, np.str_("kl"): 2.0})
    assert step.values == {"loss": 1.0, "kl": 2.0}
    assert notices == []


def test_names_that_change_on_every_step_do_not_fill_the_memory() -> None:
    intake = Intake()
    said = [text for step in range(5000) for text in intake.read(step, {f"loss/step_{step}": 1.0})[1]]
    assert len(said) < 200
    assert said[-1] == "too much to say about the metrics: no more is"
    assert len(json.dumps(intake.state_dict())) < 10_000


class Broken:
    def items(self) -> Iterator[object]:
        raise KeyError("lazy")


class Odd:
    def items(self) -> Iterator[object]:
        yield "loss", 1.0
        yield "only one"


@pytest.mark.parametrize(("metrics", "said"), [
    (None, "no mapping"), ([("loss", 1.0)], "no mapping"), (3.0, "no mapping"), ("loss", "no mapping"),
    (Broken(), "KeyError"), (Odd(), "ValueError"), (dict, "no mapping"), (Hides(), "no mapping"),
])  # fmt: skip
def test_what_is_no_mapping_is_said_once(metrics: Any, said: str) -> None:  # noqa: ANN401
    intake = Intake()
    step, notices = intake.read(0, metrics)
    assert step.values == {}
    assert len(notices) == 1
    assert said in notices[0]
    assert "must be a dict of numbers" in notices[0]
    assert intake.read(1, metrics)[1] == []
    verdict = gw.Watchdog(BOOK).observe(0, metrics)
    assert verdict.level == "notice"


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("step", [
    7, np.int32(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor([7]), 7.0, np.float32(7), torch.tensor(7.0),
    np.array([7]),
])  # fmt: skip
def test_a_step_number_of_any_type_is_a_whole_number(step: object) -> None:
    seen, notices = Intake().read(step, {})
    assert (seen.number, type(seen.number), notices) == (7, int, [])


@pytest.mark.parametrize(
    "step", [None, "7", 7.5, math.nan, math.inf, np.float64("nan"), torch.ones(2), Raises(), [], Hides()]
)
def test_a_step_that_is_no_number_is_counted_on(step: object) -> None:
    intake = Intake()
    intake.read(41, {})
    seen, notices = intake.read(step, {})
    assert seen.number == 42
    assert len(notices) == 1
    assert "is not a whole number: counted on as 42" in notices[0]
    assert intake.read(step, {}) == ((43, {}), [])
    assert Intake().read(step, {})[0].number == 0


def test_steps_may_start_anywhere_repeat_and_go_back_and_it_is_said() -> None:
    intake = Intake()
    assert intake.read(-5, {}) == ((-5, {}), [])
    assert intake.read(10**30, {}) == ((10**30, {}), [])
    assert intake.read(10**30, {})[1] == [f"step {10**30} was given twice: each row counts as one observation"]
    assert intake.read(3, {})[1] == [f"step went back from {10**30} to 3 without a rollback"]
    assert intake.read(3, {})[1] == []
    assert intake.read(2, {})[1] == []


def test_after_a_rollback_steps_may_start_again_from_there_or_simply_go_on() -> None:
    for following in (51, 52, 101):
        intake = Intake()
        intake.read(100, {})
        intake.rewind(50)
        assert intake.read(following, {})[1] == []
    intake.rewind(50)
    assert intake.read(50, {})[1] == ["step 50 was given twice: each row counts as one observation"]


# ── what is derived ───────────────────────────────────────────────────────────────────────────────────────────────
def test_the_log_ratio_is_derived_only_where_it_is_not_given_and_the_ratio_is_to_the_reference() -> None:
    both = {"mean_log_prob_current": -1.0, "mean_log_prob_ref": torch.tensor(-3.0)}
    assert Intake().read(0, both)[0].values["log_ratio"] == 2.0
    assert Intake().read(0, {**both, "log_ratio": 7.0})[0].values["log_ratio"] == 7.0
    assert Intake().read(0, {**both, "log_ratio": None})[0].values["log_ratio"] == 2.0
    assert "log_ratio" not in Intake("old").read(0, both)[0].values
    assert "log_ratio" not in Intake().read(0, {"mean_log_prob_ref": 1.0})[0].values
    infinite = {"mean_log_prob_current": math.inf, "mean_log_prob_ref": math.inf}
    assert math.isnan(Intake().read(0, infinite)[0].values["log_ratio"])


def test_the_log_prob_per_dimension_is_given_where_the_dimensions_are() -> None:
    assert Intake(dims=4).read(0, {"mean_log_prob_current": -2.0})[0].values["log_prob_per_dim"] == -0.5
    assert "log_prob_per_dim" not in Intake(dims=4).read(0, {"loss": 1.0})[0].values


def test_what_was_said_is_remembered() -> None:
    first, second = Intake(), Intake()
    first.read(5, {"los": 1, "loss": "x"})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.read(5, {"los": 1, "loss": "x"})[1] == ["step 5 was given twice: each row counts as one observation"]
    assert second.state_dict() != first.state_dict()


def test_the_metrics_handed_over_are_not_written_in() -> None:
    metrics = {"loss": 1.0, "mean_log_prob_current": 1.0, "mean_log_prob_ref": 0.0}
    before = dict(metrics)
    gw.Watchdog(BOOK).observe(0, metrics)
    assert metrics == before


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda m: m.name)
def test_the_table_says_what_each_name_means(metric: gw.Metric) -> None:
    assert METRICS[metric.name] is metric
    assert metric.name.isidentifier()
    assert metric.unit
    assert metric.reduction
    assert metric.formula
    assert metric.source in ("document", "field", "watchdog")
    assert metric.normal is None or metric.normal[0] < metric.normal[1]
    assert ("ratio" in metric.formula or not metric.pair) or "log" in metric.formula or metric.pair


def test_the_documents_nine_and_the_wider_set_are_there() -> None:
    nine = ["loss", "policy_loss", "kl_penalty", "mean_ratio", "mean_advantage", "mean_log_prob_current",
            "mean_log_prob_ref", "mean_reward", "std_reward"]  # fmt: skip
    wider = ["log_ratio", "max_abs_log_ratio", "max_ratio", "min_ratio", "ess", "step_kl", "kl", "kl_coef",
             "clip_epsilon", "clip_fraction", "std_advantage", "mean_abs_advantage", "group_std_reward",
             "zero_std_fraction", "entropy", "grad_norm", "learning_rate", "completion_length", "truncated_fraction",
             "sampler_mismatch", "param_change", "param_drift"]  # fmt: skip
    assert {*nine, *wider} <= METRICS.keys()
    assert [m.name for m in METRICS.values() if m.source == "document"] == [*nine, "log_ratio"]
