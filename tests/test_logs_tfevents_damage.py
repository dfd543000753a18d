"""Event files that are damaged, cut off, or no event files at all behind their beginning."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from event_files import VERSION, file_of, framed, read, read_or_none, rows_in, scalar
from grpo_watchdog.logs.checksums import masked
from grpo_watchdog.logs.short_checksum import masked_crc


@given(st.lists(st.binary(min_size=4, max_size=300), min_size=1, max_size=20), st.binary(max_size=20))
def test_checksums_are_those_of_tensorboard(contents: list[bytes], before: bytes) -> None:
    buffer = bytes(8) + before + b"".join(contents)
    sizes = np.array([len(content) for content in contents])
    starts = 8 + len(before) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    assert masked(buffer, starts, sizes).tolist() == [masked_crc32c(content) for content in contents]


@pytest.mark.parametrize("size", [4, 8, 63, 64, 65, 4096, 70_001])
def test_checksums_of_long_stretches(size: int) -> None:
    content = random.Random(size).randbytes(size)
    assert masked(bytes(8) + content, np.array([8]), np.array([size])).tolist() == [masked_crc32c(content)]
    assert masked_crc(content) == masked_crc32c(content)


def test_a_record_that_is_no_event_is_said_with_its_place(tmp_path: Path) -> None:
    rows, notices = rows_in(tmp_path, [b"\xff" * 30, scalar(1, "a", 1.0).SerializeToString()])
    assert rows == [(1, {"a": 1.0})]
    place = len(framed([VERSION]))
    assert notices == [f"the record at byte {place} is no event and is left out"]


def test_a_picture_larger_than_a_chunk_is_passed_over(tmp_path: Path) -> None:
    picture = Event(
        step=1,
        summary=Summary(value=[Summary.Value(tag="p", image=Summary.Image(encoded_image_string=bytes(9 << 20)))]),
    )
    rows, notices = rows_in(
        tmp_path,
        [scalar(1, "a", 1.0).SerializeToString(), picture.SerializeToString(), scalar(2, "a", 2.0).SerializeToString()],
    )
    assert rows == [(1, {"a": 1.0}), (2, {"a": 2.0})]
    assert "1 records of more than" in notices[0]


@pytest.mark.parametrize("new_style", [False, True])
def test_cut_at_every_byte_it_gives_what_was_whole(tmp_path: Path, *, new_style: bool) -> None:
    points = [(step, tag, step + 0.5) for step in range(1, 4) for tag in ("loss", "kl")]
    content = [
        Event(wall_time=1.0, step=s, summary=scalar_pb(t, v)) if new_style else scalar(s, t, v) for s, t, v in points
    ]
    whole = framed([VERSION, *(event.SerializeToString() for event in content)])
    path = tmp_path / "events"
    before = 0
    for end in range(len(framed([VERSION])) + 1, len(whole)):
        path.write_bytes(whole[:end])
        rows, notices = read_or_none(path)
        found = [(step, tag, value) for step, row in rows for tag, value in row.items()]
        assert found == points[: len(found)]
        assert len(found) >= before
        before = len(found)
        assert not rows or any("ends in the middle" in notice for notice in notices) or end in _ends(whole)
    assert before == len(points) - 1


def _ends(whole: bytes) -> set[int]:
    ends, at = set[int](), 0
    while at < len(whole):
        at += 16 + int(struct.unpack_from("<Q", whole, at)[0])
        ends.add(at)
    return ends


def test_a_flipped_byte_anywhere_never_gives_a_value_that_was_not_written(tmp_path: Path) -> None:
    points = [(step, tag, step + 0.5) for step in (1, 2, 200) for tag in ("loss", "kl")]
    whole = framed([VERSION, *(scalar(*point).SerializeToString() for point in points)])
    path = tmp_path / "events"
    rng = random.Random(1)
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        rows, notices = read_or_none(path)
        found = [(step, tag, value) for step, row in rows for tag, value in row.items()]
        assert set(found) <= set(points)
        assert not rows or found == points or any("damaged" in notice for notice in notices), at


def test_a_damaged_event_is_left_out_and_what_follows_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, [(n, "loss", float(n)) for n in range(1, 6)])
    whole = bytearray(path.read_bytes())
    third = sorted(_ends(bytes(whole)))[2]
    whole[third + 20] ^= 1
    path.write_bytes(whole)
    rows, notices = read(path)
    assert [step for step, _ in rows] == [1, 2, 4, 5]
    assert notices == [f"the record at byte {third} is damaged and is left out"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.just(scalar(1, "a", 1.0).SerializeToString()), max_size=5),
    st.binary(max_size=40),
)
def test_anything_at_all_behind_a_sound_beginning_is_a_log_or_an_error(
    tmp_path: Path, contents: list[bytes], tail: bytes
) -> None:
    path = tmp_path / "events"
    path.write_bytes(framed([VERSION, *contents]) + tail)
    rows, notices = read_or_none(path)
    assert all(1 <= len(values) <= 5 for _, values in rows)
    assert all("\n" not in notice for notice in notices)


def test_what_only_ends_like_a_scalar_is_none(tmp_path: Path) -> None:
    for made in (scalar(2, "a", 3.0), Event(wall_time=1.0, step=2, summary=scalar_pb("a", 3.0))):
        content = made.SerializeToString()
        rows, notices = rows_in(tmp_path, [content, content, b"\xff" + content[1:]])
        assert rows == [(2, {"a": 3.0})] * 2
        assert len(notices) == 1
        assert "is no event" in notices[0]


def test_a_scalar_without_a_name_is_none(tmp_path: Path) -> None:
    points = [(n, tag, 1.0) for n in range(1, 4) for tag in ("", "a")]
    assert read(file_of(tmp_path, points))[0] == [(n, {"a": 1.0}) for n in range(1, 4)]
