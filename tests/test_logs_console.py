"""The reader of console logs: one style after another, each with the noise that stands around it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_watchdog.errors import LogError
from grpo_watchdog.logs.pairs import pairs_in
from log_files import read, same

NAN, INF = math.nan, math.inf


def told(folder: Path, text: str) -> list[tuple[int | None, dict[str, float]]]:
    """Read a console log; not-a-number as the text, so that it can be compared."""
    got = read(folder, text)
    assert got.formats == ["console"]
    return [(row.step, row.values) for row in got.rows]


# --- dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("as_text", [False, True])
def test_dicts_as_transformers_prints_them(tmp_path: Path, quote: str, *, as_text: bool) -> None:
    rows = [{"loss": 0.5 * n, "kl": 1e-05 * n, "rewards/f/mean": -1.0, "epoch": 0.1 * n} for n in range(1, 6)]
    lines = ["***** Running training *****", "  Total optimization steps = 1,000", "  Num examples = 12"]
    for n, row in enumerate(rows):
        text = str({key: str(value) for key, value in row.items()} if as_text else row).replace("'", quote)
        lines += [
            f"\r {n}%|▏| {n}/100 [00:10<01:30,  9.0s/it]\x1b[32m{text}\x1b[0m",
            "WARNING: {something} odd: {1, 2}",
        ]
    lines.append(str({"eval_loss": 9.0, "eval_kl": 9.0, "epoch": 1.0}).replace("'", quote))
    lines.append(str({"train_runtime": 9.0, "train_loss": 9.0, "kl": 9.0}).replace("'", quote))
    assert told(tmp_path, "\n".join(lines)) == [(None, row) for row in rows]


def test_not_a_number_and_infinity_are_kept(tmp_path: Path) -> None:
    text = (
        "{'loss': nan, 'kl': inf, 'x': np.float64(-inf)}\n"
        "{'loss': 1.0, 'kl': tensor(nan, device='cuda:0'), 'x': np.float32(2.5)}{'loss': -inf, 'kl': None, 'x': 1}\n"
    )
    first, second, third = (values for _, values in told(tmp_path, text))
    assert math.isnan(first["loss"])
    assert (first["kl"], first["x"]) == (INF, -INF)
    assert math.isnan(second["kl"])
    assert (second["loss"], second["x"]) == (1.0, 2.5)
    assert third["loss"] == -INF
    assert math.isnan(third["kl"]), "None where a number stood before was not-a-number"


@pytest.mark.parametrize(
    "before",
    [
        "2026-01-02 03:04:05,678 [INFO] ddpo: Step {}: ",
        "\x1b[36m(Actor pid=12, ip=10.0.0.1)\x1b[0m ✨ Global step {}: ",
        "[2026-01-02 03:04:05] model.py:12 - step {}: ", "rollout {}: ", "step: {}, metrics: ", "[Step {}/99] ",
        "5, 61.4s/it]Step {}: ",
    ],
)  # fmt: skip
def test_the_step_before_a_dict(tmp_path: Path, before: str) -> None:
    text = "".join(before.format(n) + "{'reward_mean': '1.5', 'loss': 'nan'}\n" for n in (80, 85))
    got = told(tmp_path, text)
    assert [step for step, _ in got] == [80, 85]
    assert all(values["reward_mean"] == 1.5 and math.isnan(values["loss"]) for _, values in got)


def test_dicts_of_one_step_become_one_row(tmp_path: Path) -> None:
    text = "".join(f"rollout {n}: {{'rollout/r': {n}.5}}\nstep {n}: {{'train/loss': 0.5}}\n" for n in range(3))
    assert told(tmp_path, text) == [(n, {"rollout/r": n + 0.5, "train/loss": 0.5}) for n in range(3)]


def test_a_dict_over_several_lines(tmp_path: Path) -> None:
    text = "".join(f"{{\n  'loss': 0.5,\n  'm': {{'kl': tensor({n}.)}}\n}}\nnoise\n" for n in range(3))
    assert told(tmp_path, text) == [(None, {"loss": 0.5, "m/kl": float(n)}) for n in range(3)]


def test_json_behind_a_prefix_and_the_share_of_steps_of_ms_swift(tmp_path: Path) -> None:
    text = "".join(f'INFO train: {{"step": {n}, "loss": 0.5, "x": {{"y": Infinity}}}}\n' for n in (1, 2))
    assert told(tmp_path, text) == [(n, {"loss": 0.5, "x/y": INF}) for n in (1, 2)]
    text = "".join(f"{{'loss': 0.5, 'global_step/max_steps': '{n}/9', 'percentage': '1%'}}\n" for n in (1, 2))
    assert told(tmp_path, text) == [(n, {"loss": 0.5}) for n in (1, 2)]


def test_settings_printed_in_the_same_way_are_no_rows(tmp_path: Path) -> None:
    text = "{'lr': 1e-05, 'beta': 0.1, 'layers': 12}\n" + "".join(
        f"{{'loss': {n}.5, 'reward': 0.5}}\n" for n in range(4)
    )
    assert [values.get("loss") for _, values in told(tmp_path, text)] == [0.5, 1.5, 2.5, 3.5]


# --- verl ---------------------------------------------------------------------------------------


def test_verl(tmp_path: Path) -> None:
    text = (
        "step:0 - val-core/gsm8k/reward/mean@1:0.5 - val-aux/x:1.0\n"
        "(TaskRunner pid=12) step:1 - actor/lr(1e-4):0.1 - actor/pg_loss:np.float64(-0.5) - actor/kl:nan - "
        "critic/score/mean:-1e-05 - training/global_step:1\n"
        "(TaskRunner pid=12) Training Progress:   1%| | 1/9 [00:10<01:30,  9.00s/it]\n"
        "Training Progress: 2%| | 2/9 [00:10<01:30]step:2 - actor/pg_loss:inf - actor/kl:np.float32(0.5)\n"
        "step:2 - val-core/gsm8k/reward/mean@1:0.5\n"
    )
    first, second = told(tmp_path, text)
    assert first[0] == 1
    assert math.isnan(first[1].pop("actor/kl"))
    assert first[1] == {
        "actor/lr(1e-4)": 0.1, "actor/pg_loss": -0.5, "critic/score/mean": -1e-05,
    }  # fmt: skip
    assert second == (2, {"actor/pg_loss": INF, "actor/kl": 0.5})


# --- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "step {} | loss 0.5 | reward -1.5", "step={} loss=0.5 reward=-1.5", "[{}/100] loss: 0.5, reward: -1.5",
        "Iteration {}: loss 0.5, reward -1.5", "Update {}: loss=0.5 reward=-1.5",
        "Step {}:\n  loss: 0.5\n  reward: -1.5",
        "== Step {}/100 ==\n• loss: 0.5\n• reward: −1.5\n⏱ Time: 3.2s", "Step [{}/100], loss: 0.5000, reward: -1.5000",
        "2026-01-02 03:04:05,678 INFO trainer.py:12 - step {} - loss: 0.5 - reward: -1.5",
        "INFO:root:iter {} loss 0.5 reward -1.5",
        "01/02/2026 03:04:05 - INFO - __main__ - Step {} - loss = 0.5 - reward = -1.5",
        "[rank0]: Step {} loss 0.5 reward -1.5",
        "03:04:05 SUCCESS Step {} | Time: 5.23s | loss: 0.5 | reward: -1.5 | Acc.: 45.0%",
        "Epoch {}: loss=0.5, reward=-1.5",
        "train: 5%|▌ | {}/100 [00:10<01:30,  1.00s/it, loss=0.5, reward=-1.5]",
        "Step {}: loss=0.5 (max 9), reward=-1.5 ± 0.1",
        "(W pid=1) Step {} loss: tensor(0.5, device='cuda:0'), reward: np.float64(-1.5)",
        "Step {} | loss: 0.5\nStep {} | reward: -1.5",
    ],
)  # fmt: skip
def test_pairs_in_every_style(tmp_path: Path, line: str) -> None:
    noise = (
        "Loading 3 shards: done\n[Eval] step 9 | loss 9.0 | reward 9.0\nINFO engine.py:12 throughput: 1.0, Running: 5\n"
    )
    text = noise + "".join(line.replace("{}", str(n)) + "\n" for n in (10, 20, 30)) + noise
    assert told(tmp_path, text) == [(n, {"loss": 0.5, "reward": -1.5}) for n in (10, 20, 30)]


def test_minimind_counts_on_over_its_epochs(tmp_path: Path) -> None:
    text = "".join(
        f"Epoch:[{epoch}/2]({n}/200), Reward: 0.5, KL_ref: 0.1, Actor Loss: nan, Avg Response Len: 9.5, LR: 8e-07\n"
        for epoch in (1, 2)
        for n in (100, 200)
    )
    got = told(tmp_path, text)
    assert [step for step, _ in got] == [100, 200, 300, 400]
    assert math.isnan(got[0][1].pop("Actor Loss"))
    assert got[0][1] == {"Reward": 0.5, "KL_ref": 0.1, "Avg Response Len": 9.5, "LR": 8e-07}


def test_deepspeed_chat_says_the_reward_two_lines_below(tmp_path: Path) -> None:
    text = "".join(
        f"Epoch: 0 | Step: {n} | PPO Epoch: 1 | Actor Loss: inf | Critic Loss: 0.5 | Unsupervised Loss: 0.0\n"
        "|E2E latency=5.10s |Gather latency=0.00s (0.00%) |Generate time=2.70s (52.94%)\n"
        f"Average reward score: -{n}.5\n-------------------------\n"
        for n in (1, 2)
    )
    got = told(tmp_path, text)
    assert [(step, values["Actor Loss"], values["Average reward score"]) for step, values in got] == [
        (1, INF, -1.5), (2, INF, -2.5),
    ]  # fmt: skip


def test_openrlhf_draws_a_bar_for_each_rollout(tmp_path: Path) -> None:
    text = "Episode [1/1]:   6%|▋         | 2/32 [00:10<02:50,  5.69s/it]\r"
    for n in (1, 2):
        bar = (
            f"Train epoch [1/1]:  12%|█▎   | {n}/8 [00:0{n}<00:08,  1.2s/it, pg=0.{n}, rm=-0.5, kl=1e-3, act_lr=1e-6]\r"
        )
        text += bar + bar.replace("1.2s", "1.3s")
    assert told(tmp_path, text) == [(None, {"pg": n / 10, "rm": -0.5, "kl": 1e-3, "act_lr": 1e-6}) for n in (1, 2)]


def test_a_bar_that_is_drawn_again_counts_once_for_its_step(tmp_path: Path) -> None:
    bar = "train: 5%|▌ | {}/100 [00:10<01:30,  1.00s/it, loss={}, kl=0.5]\r"
    text = bar.format(1, 0.1) + bar.format(1, 0.2) + bar.format(2, 0.2) + bar.format(2, 0.3)
    assert told(tmp_path, text) == [(1, {"loss": 0.2, "kl": 0.5}), (2, {"loss": 0.3, "kl": 0.5})]


def test_frames_of_two_columns(tmp_path: Path) -> None:
    frame = "-----------------\n| time/      |   |\n|  iterations | {} |\n| train/ | |\n"
    frame += "|    loss  | 0.5 |\n|    approx_kl | nan |\n"
    got = told(tmp_path, frame.format(1) + frame.format(2))
    assert [step for step, _ in got] == [1, 2]
    assert all(values["loss"] == 0.5 and math.isnan(values["approx_kl"]) for _, values in got)


def test_thousands_and_ranks(tmp_path: Path) -> None:
    text = "".join(
        f"[rank{rank}]: Step {n}, loss: 1,234.5, num_tokens: 1,234,567, reward: 0.5\n"
        for n in (1, 2)
        for rank in (0, 1)
    )
    assert told(tmp_path, text) == [(n, {"loss": 1234.5, "num_tokens": 1234567.0, "reward": 0.5}) for n in (1, 2)]


def test_plans_are_no_steps(tmp_path: Path) -> None:
    text = "Total steps: 500\nmax steps = 400, warmup steps: 3\nsaving every 10 steps\n"
    text += "Step 1: loss=0.5\nStep 2: loss=0.5\n"
    assert told(tmp_path, text) == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]


def test_noise_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no row of numbers"):
        read(tmp_path, "Loading 12 shards\nusing GPU 3 of 8\nDone in 3.2s\nwandb: run at 2026\n")


# --- laws ---------------------------------------------------------------------------------------

KEYS = st.sampled_from(["loss", "reward", "kl", "policy/kl", "rewards/f/mean", "grad_norm"])
STYLES = st.sampled_from([
    lambda n, row: f"Step {n}: {row}",
    lambda n, row: f"step:{n} - " + " - ".join(f"{key}:np.float64({value!r})" for key, value in row.items()),
    lambda n, row: f"step {n} | " + " | ".join(f"{key}: {value!r}" for key, value in row.items()),
    lambda n, row: f"step={n} " + " ".join(f"{key}={value!r}" for key, value in row.items()),
    lambda n, row: f"Iter {n}, " + ", ".join(f"{key} {value!r}" for key, value in row.items()),
    lambda n, row: f"Step {n}:\n" + "\n".join(f"    {key}: {value!r}" for key, value in row.items()),
])  # fmt: skip
NOISE = st.sampled_from([
    "", "Loading checkpoint shards: 100%|██| 3/3 [00:01<00:00,  2.00it/s]", "(Worker pid=7) INFO ready",
    "WARNING 01-02 03:04:05 cache.py:12] only {3} of 8", "\x1b[1mhello\x1b[0m",
    "{'", "Traceback (most recent call last):",
])  # fmt: skip


@given(STYLES, st.sets(KEYS, min_size=2), st.data(), NOISE)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_style_prints_comes_back(tmp_path: Path, style, keys: set[str], data: st.DataObject, noise: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(sorted(keys), st.floats())), min_size=1, max_size=6))
    text = "\n".join(f"{noise}\n{style(n, row)}" for n, row in enumerate(rows, 1))
    got = told(tmp_path, text)
    assert [step for step, _ in got] == list(range(1, len(rows) + 1))
    for (_, values), row in zip(got, rows, strict=True):
        assert values.keys() == row.keys()
        assert all(same(values[key], row[key]) for key in row)


@pytest.mark.parametrize(
    "unit",
    ["{'", "{'a': ", "{'a': 1, ", "a=1 ", "step 1 ", "step:1 - ", "1/2 [", "\x1b[", "| ", "(a pid=", "[12/", "a: ",
     "-", "[", "\r",
     "{'b': [1,\n", "2026-01-02 ", "x 1 ", "1,234,", "epoch 1 "],
)  # fmt: skip
def test_no_line_takes_long(tmp_path: Path, unit: str) -> None:
    text = "Step 1: loss=0.5\n" + unit * (500_000 // len(unit)) + "\nStep 2: loss=0.5\n"
    begun = time.process_time()
    try:
        read(tmp_path, text)
    except LogError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either it is read or it says this
    assert time.process_time() - begun < 20


PARTS = st.sampled_from([
    "Step ", "loss", ":", "=", " ", " 1", "23", "0.5", "1e-3", "/", "[", "]", "2026-01-02", " 03:04:05", "rank 3",
    "eval ", ", ", "|", "INFO", "a.py:12", "1,234", "epoch ", "worker", "nan", "(", ")", "np.float64(2.5)", "it/s",
    "%", "reward", "-", ".",
])  # fmt: skip


@given(st.lists(PARTS, max_size=12))
def test_whether_a_line_tells_anything_does_not_depend_on_its_digits(parts: list[str]) -> None:
    line = "".join(parts)
    told, zeros = pairs_in(line), pairs_in(line.translate(str.maketrans("123456789", "0" * 9)))
    assert (told is None) == (zeros is None)
    assert told is None or zeros is None or (told.style, told.step is None) == (zeros.style, zeros.step is None)


def test_a_text_that_never_tells_anything_is_left_in_the_end(tmp_path: Path) -> None:
    begun = time.process_time()
    with pytest.raises(LogError, match="no row of numbers"):
        read(
            tmp_path,
            "loading shard 3 of 8\n" * 200_001 + "Step 1: loss=0.5 reward=0.1\nStep 2: loss=0.5 reward=0.1\n",
        )
    assert time.process_time() - begun < 20


def test_noise_before_the_first_row_and_more_of_it_behind_is_no_end(tmp_path: Path) -> None:
    noise = "loading shard 3 of 8\n"
    got = read(
        tmp_path, noise * 20_000 + "Step 1: loss=0.5 reward=0.1\n" + noise * 200_001 + "Step 2: loss=0.5 reward=0.1\n"
    )
    assert got.steps == [1, 2]
