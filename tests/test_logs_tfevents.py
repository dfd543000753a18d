"""Event files of TensorBoard: whatever wrote them, every point is there, and none that was not written."""

from __future__ import annotations

import gzip
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from event_files import Point, file_of, read, rows_in, scalar, written
from grpo_watchdog.logs import READERS, Source
from grpo_watchdog.logs.regroup import by_step

TENSORS: dict[int, tuple[dict[str, Any], float]] = {  # number of the type: the field and what stands in it for 2.5 or 2
    1: ({"float_val": [2.5]}, 2.5),
    2: ({"double_val": [2.5]}, 2.5),
    3: ({"int_val": [2]}, 2.0),
    9: ({"int64_val": [-2]}, -2.0),
    14: ({"half_val": [0x4020]}, 2.5),
    19: ({"half_val": [0x4100]}, 2.5),
    23: ({"uint64_val": [2]}, 2.0),
}
RAW = {1: "<f", 2: "<d", 3: "<i", 4: "<B", 5: "<h", 6: "<b", 9: "<q", 17: "<H", 19: "<e", 22: "<I", 23: "<Q"}
tags = st.text(st.characters(codec="utf-8"), max_size=40).map(lambda text: f"x{text}")
floats = st.floats(width=32)


def tensor_event(step: int, tensor: Any) -> bytes:  # noqa: ANN401 - a message of protobuf
    value = Summary.Value(tag="loss", tensor=tensor)
    content: bytes = Event(wall_time=1.0, step=step, summary=Summary(value=[value])).SerializeToString()
    return content


@pytest.mark.parametrize("new_style", [False, True])
def test_what_torch_writes(tmp_path: Path, *, new_style: bool) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow

    values = [0.5, math.nan, math.inf, 0.0, -1e-30, 0.0]
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar("train/loss", value, step, new_style=new_style)
            writer.add_scalar("reward", step, step, new_style=new_style)
            writer.add_scalar("eval/reward", 9.0, step, new_style=new_style)
        writer.add_histogram("weights", np.arange(10), 2)
        writer.add_text("note", "loss 3.5", 2)
    (file,) = tmp_path.glob("*tfevents*")
    rows, notices = read(file)
    assert [step for step, _ in rows] == list(range(6))
    assert [row["reward"] for _, row in rows] == list(range(6))
    assert [row["train/loss"] for _, row in rows] == pytest.approx(values, nan_ok=True, rel=1e-6)
    assert all(len(row) == 2 for _, row in rows)
    assert notices == []


def test_hyperparameters_of_torch_are_passed_over(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 1)
        writer.add_hparams({"lr": 1e-3}, {"hparam/loss": 2.0}, run_name=".")
    found = [row for file in tmp_path.rglob("*tfevents*") for row in read(file)[0]]
    assert (1, {"loss": 1.0}) in found
    assert not any("lr" in values or "_hparams_/experiment" in values for _, values in found)


def test_what_tensorboard_writes_for_tf2(tmp_path: Path) -> None:
    events = [
        Event(wall_time=float(step), step=step, summary=scalar_pb("loss", step / 4)) for step in (0, 1, 127, 128, 70000)
    ]
    rows, _ = read(written(tmp_path, events))
    assert rows == [(step, {"loss": step / 4}) for step in (0, 1, 127, 128, 70000)]


def test_many_scalars_in_one_event(tmp_path: Path) -> None:
    values = [Summary.Value(tag=tag, simple_value=number) for number, tag in enumerate("abc")]
    rows, _ = read(written(tmp_path, [Event(step=step, summary=Summary(value=values)) for step in (3, 4)]))
    assert rows == [(3, {"a": 0, "b": 1, "c": 2}), (4, {"a": 0, "b": 1, "c": 2})]


@pytest.mark.parametrize("kind", sorted(TENSORS))
def test_tensors_by_field(tmp_path: Path, kind: int) -> None:
    field, number = TENSORS[kind]
    rows, _ = rows_in(tmp_path, [tensor_event(step, TensorProto(dtype=kind, **field)) for step in (1, 2, 3)])
    assert rows == [(step, {"loss": number}) for step in (1, 2, 3)]


@pytest.mark.parametrize("kind", sorted(RAW))
def test_tensors_by_raw_bytes(tmp_path: Path, kind: int) -> None:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    contents = [
        tensor_event(step, TensorProto(dtype=kind, tensor_shape=shape, tensor_content=struct.pack(RAW[kind], step)))
        for step in (3, 1, 2)
    ]
    assert rows_in(tmp_path, contents)[0] == [(step, {"loss": step}) for step in (3, 1, 2)]


def test_tensors_of_several_numbers_and_of_text_are_no_scalars(tmp_path: Path) -> None:
    pair = TensorProto(dtype=1, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=2)]), float_val=[1, 2])
    text = TensorProto(dtype=7, string_val=[b"3.5"])
    contents = [tensor_event(1, pair), tensor_event(1, text), scalar(1, "reward", 2.0).SerializeToString()]
    assert rows_in(tmp_path, contents)[0] == [(1, {"reward": 2.0})]


@pytest.mark.parametrize("step", [-5, 1 << 20, 1 << 34, 1 << 40, (1 << 53) + 1])
def test_steps_of_every_width(tmp_path: Path, step: int) -> None:
    points = [(step + n, tag, float(n)) for n in range(3) for tag in ("a", "b")]
    rows, _ = read(file_of(tmp_path, points))
    assert rows == [(step + n, {"a": float(n), "b": float(n)}) for n in range(3)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["xa", "xb/c"]) | tags, floats)))
def test_every_point_is_there_and_no_other(tmp_path: Path, points: list[Point]) -> None:
    path = file_of(tmp_path, [*points, (301, "loss", 0.25)])
    found = [(step, tag, value) for step, row in read(path)[0] for tag, value in row.items()]
    assert sorted(map(repr, found)) == sorted(map(repr, [*points, (301, "loss", 0.25)]))


def test_more_than_ten_thousand_points_a_tag_over_several_chunks(tmp_path: Path) -> None:
    names = [f"train/a_longer_name_of_a_metric_{n}" for n in range(5)]
    points = [(step, name, float(step)) for step in range(12_000) for name in names]
    path = file_of(tmp_path, points)
    assert path.stat().st_size > 1 << 22
    rows, notices = read(path)
    assert rows == [(step, dict.fromkeys(names, float(step))) for step in range(12_000)]
    assert notices == []


def test_the_points_are_those_of_the_event_accumulator(tmp_path: Path) -> None:
    rng = random.Random(3)
    points = [(step, tag, rng.gauss(0, 1)) for step in range(200) for tag in ("kl", "train/reward", "entropy")]
    path = written(tmp_path, [scalar(*point) for point in points])
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    theirs = {(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    ours = {(step, tag, value) for step, row in read(path)[0] for tag, value in row.items()}
    assert ours == theirs
    assert len(ours) == len(points)


def test_written_key_by_key(tmp_path: Path) -> None:
    points = [(step, tag, float(step)) for tag in ("loss", "kl", "reward") for step in range(1, 500)]
    assert read(file_of(tmp_path, points))[0] == [
        (step, {"loss": float(step), "kl": float(step), "reward": float(step)}) for step in range(1, 500)
    ]


def test_a_key_that_comes_again_begins_another_row(tmp_path: Path) -> None:
    points = [(1, "loss", 1.0), (1, "kl", 0.1), (1, "loss", 2.0), (1, "kl", 0.2), (2, "loss", 3.0)]
    assert read(file_of(tmp_path, points))[0] == [
        (1, {"loss": 1.0, "kl": pytest.approx(0.1)}),
        (1, {"loss": 2.0, "kl": pytest.approx(0.2)}),
        (2, {"loss": 3.0}),
    ]


def test_a_run_that_was_taken_up_again_keeps_both_tries(tmp_path: Path) -> None:
    first = [(step, tag, 1.0) for step in range(1, 6) for tag in ("loss", "kl")]
    again = [(step, tag, 2.0) for step in range(3, 6) for tag in ("new", "loss", "kl")]
    rows, _ = read(file_of(tmp_path, first + again))
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 3, 4, 5]
    assert rows[5] == (3, {"new": 2.0, "loss": 2.0, "kl": 2.0})
    assert rows[2] == (3, {"loss": 1.0, "kl": 1.0})


def test_steps_that_were_never_counted_are_no_steps(tmp_path: Path) -> None:
    points = [(0, tag, float(n)) for n in range(3) for tag in ("loss", "kl")]
    assert read(file_of(tmp_path, points))[0] == [(None, {"loss": float(n), "kl": float(n)}) for n in range(3)]


def test_what_transformers_writes_at_the_end_is_no_row(tmp_path: Path) -> None:
    points = [(1, "train/loss", 1.0), (1, "train/epoch", 0.5), (2, "eval/loss", 3.0), (2, "train/epoch", 1.0)]
    points += [(1, "train/train_runtime", 9.0), (1, "train/train_loss", 7.0), (1, "train/epoch", 1.0)]
    assert read(file_of(tmp_path, points))[0] == [(1, {"train/loss": 1.0, "train/epoch": 0.5})]


def test_events_that_hold_no_scalars_are_passed_over(tmp_path: Path) -> None:
    others = [
        Event(wall_time=1.0, step=1, graph_def=b"\x09" * 200),
        Event(wall_time=1.0, step=1, session_log=SessionLog(status=SessionLog.START)),
        Event(),
    ]
    rows, notices = rows_in(
        tmp_path, [*(e.SerializeToString() for e in others), scalar(1, "a", 1.0).SerializeToString()]
    )
    assert (rows, notices) == ([(1, {"a": 1.0})], [])


def test_compressed(tmp_path: Path) -> None:
    plain = file_of(tmp_path, [(1, "a", 1.0), (2, "a", 2.0)])
    packed = tmp_path / "events.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)


def test_an_event_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(file_of(tmp_path, [(1, "loss", 1.0)]).read_bytes())
    source = Source(path)
    assert next(reader.NAME for reader in READERS if reader.recognises(source)) == "tfevents"
    source.close()


def test_every_kind_of_not_a_number_is_one(tmp_path: Path) -> None:
    content = scalar(1, "a", 1.0).SerializeToString()
    for quiet in (b"\0\0\xc0\x7f", b"\1\0\xa0\x7f", b"\1\0\x80\xff"):
        rows, _ = rows_in(tmp_path, [content, content[:-4] + quiet])
        assert math.isnan(rows[1][1]["a"])


def test_after_a_restart_no_row_from_before_grows(tmp_path: Path) -> None:
    points = [(1, "loss", 1.0), (2, "loss", 2.0), (1, "loss", 3.0), (2, "kl", 4.0)]
    assert read(file_of(tmp_path, points))[0] == [
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0}),
        (1, {"loss": 3.0}),
        (2, {"kl": 4.0}),
    ]


def test_a_step_behind_the_summary_is_the_step_of_that_event_only(tmp_path: Path) -> None:
    first, last = (scalar(0, "a", value).SerializeToString() for value in (1.0, 2.0))
    turned = scalar(0, "b", 3.0).SerializeToString() + b"\x10\x07"
    rows, _ = rows_in(tmp_path, [first, turned, last])
    assert sorted(rows, key=str) == [(0, {"a": 1.0}), (0, {"a": 2.0}), (7, {"b": 3.0})]


def test_the_last_step_in_an_event_is_its_step(tmp_path: Path) -> None:
    contents = [scalar(step, "a", float(step)).SerializeToString() + b"\x10\x01" for step in (1, 2, 3)]
    assert rows_in(tmp_path, contents)[0] == [(1, {"a": 1.0}), (1, {"a": 2.0}), (1, {"a": 3.0})]


@pytest.mark.parametrize("numbered", [False, True])
def test_rows_beyond_those_that_are_kept_open(*, numbered: bool) -> None:
    wide = {f"key {n}": float(n) for n in range(200)}
    parts = [(step if numbered else 0, dict(wide)) for step in range(3000)]
    rows = list(by_step([*parts, *([(2999, {"late": 1.0}), (0, {"late": 2.0})] if numbered else [])]))
    steps = [row.step for row in rows]
    if numbered:
        assert steps == [*range(3000), 0]  # 0 was closed long before
        assert rows[2999].values == {**wide, "late": 1.0}
        assert rows[3000].values == {"late": 2.0}
    else:
        assert steps == [None] * 3000
        assert all(row.values == wide for row in rows)
