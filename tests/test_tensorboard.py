"""TensorBoard: what the watchdog writes is there when the files are read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import grpo_watchdog as gw


class Config:
    def __init__(self) -> None:
        self.beta, self.epsilon = 0.1, 0.2


def watched_run(run_dir: Path | None, tensorboard: Any) -> None:  # noqa: ANN401
    """Three healthy steps, one in the second band, one in the third (with nothing proven: a halt)."""
    model, config = torch.nn.Linear(2, 2), Config()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with gw.attach(
        model=model, optimizer=optimizer, kl_coef=gw.attr(config, "beta"), clip_epsilon=gw.attr(config, "epsilon"),
        run_dir=run_dir, tensorboard=tensorboard,
    ) as dog:  # fmt: skip
        for step, log_ratio in enumerate([0.0, 0.0, 0.0, 12.0, 25.0]):
            optimizer.step()
            dog.observe(10 * step, {"log_ratio": log_ratio})


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(e.step, float(f"{e.value:.6g}")) for e in events.Scalars(tag)]  # written as float32


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def check(events: EventAccumulator) -> None:
    assert scalars(events, "watchdog/level") == [(0, 0), (10, 0), (20, 0), (30, 2), (40, 3)]
    assert scalars(events, "watchdog/knob/learning_rate")[:2] == [(0, 1e-5), (40, 5e-7)]
    assert scalars(events, "watchdog/knob/kl_coef") == [(0, 0.1), (40, 1.0)]
    assert scalars(events, "watchdog/knob/clip_epsilon") == [(0, 0.2), (40, 0.1)]
    assert scalars(events, "watchdog/rule/log_ratio") == [(30, 2), (40, 3)]
    assert scalars(events, "watchdog/action/raise_kl_coef") == [(30, 1), (40, 1)]
    assert scalars(events, "watchdog/action/halt") == [(40, 1)]
    texts = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("watchdog/interventions/text_summary")]
    assert any("lower_learning_rate 1e-05 -> 5e-07" in text for text in texts)
    assert any("halt" in text for text in texts)


def test_true_writes_into_the_run_folder(tmp_path: Path) -> None:
    watched_run(tmp_path / "run", tensorboard=True)
    check(read(tmp_path / "run" / "tensorboard"))


def test_a_rule_that_ends_goes_back_to_zero(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with SummaryWriter(str(tmp_path)) as writer:
        dog = gw.attach(model=model, optimizer=optimizer, tensorboard=writer)
        for step in range(40):
            dog.observe(step, {"mean_reward": 1.2 if step < 20 else 0.5})
    seen = scalars(read(tmp_path), "watchdog/rule/mean_reward")
    assert max(value for _, value in seen) > 0
    assert seen[-1][1] == 0


def test_a_folder_is_written_into(tmp_path: Path) -> None:
    watched_run(None, tmp_path / "elsewhere")
    check(read(tmp_path / "elsewhere"))


def test_a_writer_of_the_user_is_used_and_left_open(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("reward", 0.5, 0)
        watched_run(None, writer)
        writer.add_scalar("reward", 0.6, 1)
    events = read(tmp_path)
    check(events)
    assert scalars(events, "reward") == [(0, 0.5), (1, 0.6)]


def test_true_without_a_run_folder_is_refused() -> None:
    with pytest.raises(gw.ConfigurationError, match="give run_dir"):
        watched_run(None, tensorboard=True)


def test_a_writer_that_fails_never_reaches_the_training(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError("no space left on device")

    watched_run(tmp_path / "run", Full())
