"""The readers of JSON, JSONL, CSV, parquet, notebooks and this project's journal."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_watchdog.errors import LogError
from grpo_watchdog.logs.numbers import number
from log_files import read, same

NAN, INF = math.nan, math.inf
ROWS: list[dict[str, object]] = [{"step": 10, "loss": 0.5, "reward": -1.0}, {"step": 20, "loss": 0.25, "reward": 2.0}]
EXPECTED = [(10, {"loss": 0.5, "reward": -1.0}), (20, {"loss": 0.25, "reward": 2.0})]


def pairs(folder: Path, content: str | bytes, name: str) -> list[tuple[int | None, dict[str, float]]]:
    return [(row.step, row.values) for row in read(folder, content, name).rows]


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1.2e-05", 1.2e-05), ("-Infinity", -INF), ("inf", INF), (" 3 ", 3.0), ("np.float64(0.5)", 0.5),
        ("tensor(1.5, device='cuda:0')", 1.5), ("tensor([2.])", 2.0), ("Decimal('0.1')", 0.1),
         (7, 7.0), ("1e99999", INF),
    ],
)  # fmt: skip
def test_what_is_a_number(written: object, meant: float) -> None:
    assert number(written) == meant


def test_a_whole_number_that_no_float_holds_is_infinite() -> None:
    assert number(10**5000) == INF
    assert number(-(10**5000)) == -INF


@pytest.mark.parametrize(
    "written", [True, None, "", "-", "None", "No Log", "45%", "1_000", "0x10", "1.2.3", "12s", [1]]
)
def test_what_is_no_number(written: object) -> None:
    assert number(written) is None


@pytest.mark.parametrize("written", ["nan", "NaN", "np.float32(nan)", "tensor(nan)"])
def test_not_a_number_stays_so(written: str) -> None:
    value = number(written)
    assert value is not None
    assert math.isnan(value)


@given(st.floats())
def test_every_float_comes_back_from_its_text(value: float) -> None:
    for text in (repr(value), f"np.float64({value!r})"):
        found = number(text)
        assert found is not None
        assert same(found, value)


# --- trainer_state.json -------------------------------------------------------------------------

HISTORY: list[dict[str, object]] = [
    {"step": 1, "loss": 0.5, "kl": 0.1, "epoch": 0.1},
    {"step": 1, "eval_loss": 9.0, "eval_reward": 9.0, "epoch": 0.1},
    {"step": 2, "loss": NAN, "kl": None, "epoch": 0.2},
    {"step": 2, "train_runtime": 9.0, "train_loss": 9.0, "total_flos": 9.0, "epoch": 0.2},
]


@pytest.mark.parametrize("outer", [{"global_step": 2}, {"run": {"name": "x"}, "result": {"loss": 3.0}}])
def test_trainer_state_gives_rows_of_training_only(tmp_path: Path, outer: dict[str, object]) -> None:
    got = read(tmp_path, json.dumps({**outer, "log_history": HISTORY}), "trainer_state.json")
    assert got.formats == ["trainer_state"]
    assert got.steps == [1, 2]
    assert got.values[0] == {"loss": 0.5, "kl": 0.1, "epoch": 0.1}
    assert math.isnan(got.values[1]["loss"])
    assert math.isnan(got.values[1]["kl"]), "null where other rows hold numbers was not-a-number"
    assert any("null in kl" in notice for notice in got.notices)


def test_null_of_a_key_that_never_held_a_number_is_absent(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 0.5, "grad_norm": None} for n in (1, 2)]
    got = read(tmp_path, json.dumps({"log_history": rows}), "trainer_state.json")
    assert got.values == [{"loss": 0.5}] * 2


def test_the_empty_cells_of_a_table_are_absent(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 0.5, "kl": 0.1, "learning_rate": 1.0, "grad_norm": 1.0, "epoch": 0.1, "eval_loss": None},
        {"step": 2, "loss": 0.5, "kl": None, "learning_rate": 1.0, "grad_norm": 1.0, "epoch": 0.1, "eval_loss": None},
    ]
    assert "kl" not in read(tmp_path, json.dumps(rows), "rows.json").values[1]


@pytest.mark.parametrize("shape", ['{"log_history": %s}', "%s"])
def test_a_torn_document_gives_its_beginning(tmp_path: Path, shape: str) -> None:
    whole = shape % json.dumps(ROWS)
    torn = whole[: whole.index("0.25") + 2]
    got = read(tmp_path, torn, "x.json")
    assert [(row.step, row.values) for row in got.rows] == EXPECTED[:1]
    assert any("breaks off" in notice for notice in got.notices)


# --- JSON in other shapes -----------------------------------------------------------------------

COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


@pytest.mark.parametrize(
    "document",
    [
        ROWS,
        {"config": {"lr": 1.0, "layers": [1, 2, 3]}, "history": ROWS},
        {"a": {"b": {"training_dynamics": ROWS}}},
        COLUMNS,
        {"metrics": COLUMNS, "seed": 1},
        {key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]},
        {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]},
        {str(n): row for n, row in enumerate(ROWS)},
        {f"step_{row['step']}": {"loss": row["loss"], "reward": row["reward"]} for row in ROWS},
        {"train_history": ROWS, "eval_history": [{"step": n, "loss": 9.0, "reward": 9.0} for n in range(9)]},
        [{"step": row["step"], "metrics": {"loss": row["loss"], "reward": row["reward"]}} for row in ROWS],
        [{**row, "samples": [{"text": "a", "score": 1.0}] * 5} for row in ROWS],
        [{**row, "name": "x", "done": False} for row in ROWS],
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_in_every_shape(tmp_path: Path, document: object, indent: int | None) -> None:
    assert pairs(tmp_path, json.dumps(document, indent=indent), "x.json") == EXPECTED


def test_runs_beside_each_other_in_one_document(tmp_path: Path) -> None:
    got = read(tmp_path, json.dumps({"grpo": ROWS, "ppo": ROWS}), "x.json")
    assert got.runs == ["grpo", "grpo", "ppo", "ppo"]
    got = read(tmp_path, json.dumps([{"name": "a", "history": ROWS}, {"name": "b", "history": ROWS}]), "x.json")
    assert got.runs == ["a", "a", "b", "b"]


def test_documents_behind_each_other(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert pairs(tmp_path, text, "x.json") == EXPECTED


def test_a_curve_as_tensorboard_hands_it_out(tmp_path: Path) -> None:
    assert pairs(tmp_path, "[[1.5, 1, 0.5], [1.6, 2, NaN]]", "reward.json")[0] == (1, {"reward": 0.5})


def test_lists_of_numbers_are_summed_up_and_nested_keys_joined(tmp_path: Path) -> None:
    rows = [{"step": n, "rewards": [1.0, 3.0], "policy": {"kl": 0.1, "deep": {"x": 2}}} for n in (1, 2)]
    got = read(tmp_path, json.dumps(rows), "x.json")
    assert got.values[0] == {
        "rewards/mean": 2.0, "rewards/std": math.sqrt(2.0), "rewards/min": 1.0, "rewards/max": 3.0,
        "policy/kl": 0.1, "policy/deep/x": 2.0,
    }  # fmt: skip
    assert any("lists of numbers" in notice for notice in got.notices)


def test_an_epoch_that_is_a_row_numbers_the_rows(tmp_path: Path) -> None:
    rows = [{"epoch": n, "loss": 1.0 / (n + 1)} for n in range(5)]
    assert read(tmp_path, json.dumps(rows), "x.json").steps == [0, 1, 2, 3, 4]
    rows = [{"epoch": n / 10, "loss": 1.0 / (n + 1)} for n in range(5)]
    assert read(tmp_path, json.dumps(rows), "x.json").steps == [None] * 5


def test_a_constant_is_no_step(tmp_path: Path) -> None:
    rows = [{"num_steps": 8, "loss": float(n)} for n in range(3)]
    got = read(tmp_path, json.dumps(rows), "x.json")
    assert got.steps == [None] * 3
    assert got.values[2] == {"num_steps": 8.0, "loss": 2.0}


@pytest.mark.parametrize(
    "text", ['{"step": 1, "loss": }', '[{"a": ' * 5000, "[" * 100_000, '{"a":' * 100_000, "[{", '{"a"']
)
def test_broken_json_is_one_line_of_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(LogError) as caught:
        read(tmp_path, text, "x.json")
    assert "\n" not in str(caught.value)
    assert "x.json" in str(caught.value)


# --- JSONL --------------------------------------------------------------------------------------


def test_jsonl_passes_over_what_is_no_object(tmp_path: Path) -> None:
    text = (
        '{"step":1,"loss":0.5}\n\nWARNING: x\n{"step":2,"loss":Infinity,"y":1e999,"z":'
        + "9" * 6000
        + '}\n{"step":3,"lo'
    )
    got = read(tmp_path, text, "x.jsonl")
    assert got.formats == ["jsonl"]
    assert [(row.step, row.values) for row in got.rows] == [(1, {"loss": 0.5}), (2, {"loss": INF, "y": INF, "z": INF})]
    assert got.notices == ["lines that are no JSON objects and are left out: 2; the first is line 3"]


def test_jsonl_tells_runs_apart_and_leaves_evaluations_out(tmp_path: Path) -> None:
    lines = [
        {"type": "config", "lr": 1e-5}, {"run": "a", "step": 1, "loss": 1.0}, {"run": "b", "step": 1, "loss": 2.0},
        {"step": 1, "eval": True, "loss": 9.0}, {"step": 1, "split": "val", "loss": 9.0},
        {"step": 1, "eval/loss": 9.0, "epoch": 0.1}, {"run": "a", "step": 2, "loss": 3.0, "split": "train"},
    ]  # fmt: skip
    got = read(tmp_path, "\n".join(map(json.dumps, lines)), "x.jsonl")
    assert [(row.run, row.step, row.values["loss"]) for row in got.rows] == [
        ("a", 1, 1.0),
        ("b", 1, 2.0),
        ("a", 2, 3.0),
    ]


def test_parts_of_a_step_become_one_row_and_repetitions_stay(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 1.0, "time": 0.1}, {"step": 1, "reward": 2.0, "time": 0.2},
        {"step": 2, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.0},
    ]  # fmt: skip
    got = pairs(tmp_path, "\n".join(map(json.dumps, lines)), "x.jsonl")
    assert got == [(1, {"loss": 1.0, "reward": 2.0, "time": 0.2}), (2, {"loss": 1.0}), (2, {"loss": 2.0})]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "reward", "kl", "a/b"]), st.floats(), min_size=1),
        min_size=2,
        max_size=8,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_rows_come_out_of_jsonl_json_and_python(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    numbered: list[dict[str, object]] = [{"step": n, **row} for n, row in enumerate(rows)]
    texts = {"x.jsonl": "\n".join(map(json.dumps, numbered)), "x.json": json.dumps(numbered)}
    if len({tuple(row) for row in rows}) == 1:  # else a line is noise for its keys
        texts["x.log"] = "\n".join(f"Step {row.pop('step')}: {row}" for row in (dict(r) for r in numbered))
    for name, text in texts.items():
        got = read(tmp_path, text, name)
        assert got.steps == list(range(len(rows))), name
        for found, row in zip(got.values, rows, strict=True):
            assert found.keys() == row.keys()
            assert all(same(found[key], row[key]) for key in row)


# --- CSV and its like ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "step,loss,reward\n10,0.5,-1\n20,0.25,2\n",
        "\ufeffstep,loss,reward\r\n10,0.5,-1\r\n20,0.25,2",
        ",step,loss,reward\n0,10,0.5,-1\n1,20,0.25,2\n",
        "# a comment\n\nstep;loss;reward\n10;0,5;-1,0\n20;0,25;2,0\n",
        "step\tloss\treward\n10\t0.5\t-1\n20\t0.25\t2\n",
        "| step | loss | reward |\n|---|:--:|---|\n| 10 | 0.5 | -1 |\n| 20 | 0.25 | 2 |\n\nThat was it.\n",
        "My log:\n\n   step  loss  reward\n0    10  0.50    -1.0\n1    20  0.25     2.0\n",
        "Look at this:\nstep loss reward\n10 0.5 -1\n20 0.25 2\nend of it\n",
        'step,text,loss,reward\n10,"a, ""b""\nc",0.5,-1\n20,d,0.25,2\n',
        'step,text,loss,reward\n10,"' + "a,\n\n" * 99 + '",0.5,-1\n20,d,0.25,2\n',
        "step,loss,reward,tag\n10,0.5,-1,x\nstep,loss,reward,tag\n20,0.25,2,No Log\n",
        "step,tag,value\n10,loss,0.5\n20,loss,0.25\n10,reward,-1\n20,reward,2\n10,eval/loss,9\n",
        "step,loss,reward\n10,0.5,\n10,,-1\n20,,2\n20,0.25,\n",
    ],
)
def test_tables_in_every_shape(tmp_path: Path, text: str) -> None:
    assert pairs(tmp_path, text, "x.csv") == EXPECTED
    assert pairs(tmp_path, gzip.compress(text.encode()), "x.csv.gz") == EXPECTED
    assert pairs(tmp_path, text.encode("utf-16"), "x.txt") == EXPECTED


def test_a_notebook_table_keeps_nan_apart_from_what_was_not_logged(tmp_path: Path) -> None:
    text = "Step,Training Loss,completions / mean_length,kl\n1,0.000000,No Log,nan\n2,nan,12,\n"
    got = read(tmp_path, text, "x.csv").values
    assert got[0].keys() == {"Training Loss", "kl"}
    assert math.isnan(got[0]["kl"])
    assert got[1].keys() == {"Training Loss", "completions/mean_length"}


def test_a_panel_of_wandb(tmp_path: Path) -> None:
    text = '"Step","a - r","a - r__MIN","a - r__MAX","b - 1 - r","b - 1 - r__MIN"\n1,0.5,0,9,0.1,0\n2,0.6,0,9,"",""\n'
    got = read(tmp_path, text, "x.csv").rows
    assert [(row.run, row.step, row.values) for row in got] == [
        ("a", 1, {"r": 0.5}), ("b - 1", 1, {"r": 0.1}), ("a", 2, {"r": 0.6}),
    ]  # fmt: skip


def test_a_curve_of_tensorboard_is_named_after_its_file(tmp_path: Path) -> None:
    text = "Wall time,Step,Value\n1.5,1,0.1\n1.6,2,0.2\n"
    assert pairs(tmp_path, text, "run-x-tag-train_reward.csv") == [
        (1, {"train_reward": 0.1}),
        (2, {"train_reward": 0.2}),
    ]


def test_an_open_quotation_mark_costs_only_what_is_near(tmp_path: Path) -> None:
    text = 'step,loss\n1,0.5\n2,"' + "x\n" * 20_000 + "".join(f"{n},0.25\n" for n in range(3, 9))
    got = read(tmp_path, text, "x.csv")
    assert got.steps[0] == 1
    assert 8 in got.steps
    assert any("cut into cells" in notice for notice in got.notices)


def test_numbers_without_a_heading_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no row of numbers"):
        read(tmp_path, "1,2,3\n4,5,6\n", "x.csv")


@given(st.lists(st.tuples(st.floats(), st.floats() | st.none()), min_size=1, max_size=20), st.sampled_from(",;\t"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_to_csv_is_read(tmp_path: Path, rows: list[tuple[float, float | None]], mark: str) -> None:
    lines = [mark.join((str(n), repr(a), "" if b is None else repr(b))) for n, (a, b) in enumerate(rows)]
    got = read(tmp_path, "\n".join([mark.join(("step", "loss", "kl")), *lines]), "x.csv")
    assert got.steps == list(range(len(rows)))
    for values, (a, b) in zip(got.values, rows, strict=True):
        assert same(values["loss"], a)
        assert ("kl" in values) == (b is not None)
        assert b is None or same(values["kl"], b)


# --- parquet, notebooks, the journal ------------------------------------------------------------


def test_parquet_keeps_nan_apart_from_null(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"step": [1, 2, 3], "loss": [0.5, NAN, None], "text": ["a", "b", "c"], "kl": [0.1, 0.2, 0.3]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    data = (tmp_path / "a.parquet").read_bytes()
    for name, content in (("x.parquet", data), ("x.gz", gzip.compress(data))):
        got = read(tmp_path, content, name)
        assert got.formats == ["parquet"]
        assert got.steps == [1, 2, 3]
        assert math.isnan(got.values[1]["loss"])
        assert got.values[2] == {"kl": 0.3}
    with pytest.raises(LogError, match="pyarrow cannot read it"):
        read(tmp_path, data[: len(data) // 2], "x.parquet")


def test_a_notebook_gives_what_its_cells_show(tmp_path: Path) -> None:
    table = (
        "<table><tr><th>Step</th><th>Training Loss</th><th>completions / mean_length</th></tr>"
        "<tr><td>1</td><td>0.5</td><td>No Log</td></tr><tr><td>2</td><td>nan</td><td>3</td></tr></table>"
    )
    cells = [
        {"cell_type": "markdown", "source": ["| a | b |"]},
        {
            "cell_type": "code",
            "outputs": [{"output_type": "stream", "text": ["hello\n", "{'loss': 1.0, 'reward': 2.0}\n"]}],
        },
        {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": {"text/html": [table]}}]},
    ]
    got = read(tmp_path, json.dumps({"cells": cells, "nbformat": 4}), "x.ipynb")
    assert got.formats == ["notebook"]
    assert got.steps == [1, 2]
    assert got.values[0] == {"Training Loss": 0.5}
    assert got.values[1]["completions/mean_length"] == 3.0


def test_the_journal_of_this_project(tmp_path: Path) -> None:
    entries = [
        {"kind": "start", "schema": 1, "state": {}}, {"kind": "step", "step": 1, "values": {"loss": 0.5, "kl": "NaN"}},
        {"kind": "decision", "step": 1, "level": "ok"}, {"kind": "start", "schema": 1, "state": {}},
        {"kind": "step", "step": 2, "values": {"loss": "Infinity"}},
    ]  # fmt: skip
    text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries) + '{"kind":"st'
    got = read(tmp_path, text, "journal.jsonl")
    assert got.formats == ["journal"]
    assert [(row.run, row.step) for row in got.rows] == [("", 1), ("session 2", 2)]
    assert math.isnan(got.values[0]["kl"])
    assert got.values[1] == {"loss": INF}
    with pytest.raises(LogError, match="schema 99"):
        read(tmp_path, '{"kind":"start","schema":99}\n{"kind":"step"}\n', "journal.jsonl")


# --- whatever else is in a file -----------------------------------------------------------------

JUNK = st.one_of(
    st.binary(max_size=400),
    st.text(max_size=400).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text("{}[]()'\":,=|-\n\t .0123456789eEnaifstploxé", max_size=400).map(str.encode),
)
WHOLE = [
    json.dumps({"log_history": HISTORY}).encode(), json.dumps(ROWS).encode(), json.dumps(COLUMNS).encode(),
    b"\n".join(json.dumps(row).encode() for row in ROWS), b"step,loss\n1,0.5\n2,nan\n",
    b"| step | loss |\n|--|--|\n| 1 | 2 |\n",
    b"Step 1: {'loss': np.float64(0.5), 'x': [1, 2]}\nstep:1 - a/b:0.5 - c:nan\n",
    json.dumps({"cells": [{"cell_type": "code", "outputs": []}], "nbformat": 4}).encode(),
    b'{"kind":"start","schema":1}\n{"kind":"step","step":1,"values":{"loss":"NaN"}}\n', b"PAR1xxxxPAR1",
]  # fmt: skip


@given(st.sampled_from(WHOLE), st.integers(0, 200), st.integers(0, 30), JUNK)
@settings(max_examples=400)
def test_nothing_but_a_log_error_is_ever_raised(whole: bytes, at: int, cut: int, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            got = read(Path(folder), whole[:at] + junk + whole[at + cut :], "x.log")
        except LogError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either it is read or it says this
        else:
            assert all(isinstance(value, float) for row in got.rows for value in row.values.values())


@pytest.mark.parametrize(
    "content", [b"", b"\n\n  \n", b"\x80\x04\x95abc" * 9, b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4]
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(LogError) as caught:
        read(tmp_path, content, "x.bin")
    assert "\n" not in str(caught.value)


def test_a_bomb_of_zeros_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError):
        read(tmp_path, gzip.compress(bytes(1 << 26)), "x.json.gz")


def test_the_recorded_runs_are_read_whole() -> None:
    folder = Path(__file__).parents[2] / "shared" / "recorded_runs"
    if not folder.is_dir():
        pytest.skip("../shared/recorded_runs is not here")
    counts = {
        "cas_wordle_4090_flat.json": (400, 10000), "hotpotqa_grpo_v1.log": (93, 837),
        "ddpo_sd15_nan_loss.log": (85, 425),
        "kartik_grpo_v1_zero_variance.json": (200, 3050), "rookworld_overfit_kl182.json": (100, 4900),
        "rec_grpo_capinf.jsonl": (140, 1680), "ricalanis_answering.csv": (192, 3653), "mdm_ddpo_epsilon.csv": (7, 792),
        "verl_ppo_gemma2_2b.log": (106, 4260), "verl_uqcxu9_v5_700.log": (700, 38504),
        "nips_gate2_rho0p70_seed43_spike.log": (200, 1800), "incident_commander_500.json": (50, 450),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for name, (rows, numbers) in counts.items():
            got = read(Path(place), (folder / name).read_bytes(), name)
            assert (len(got.rows), sum(map(len, got.values))) == (rows, numbers), name


def test_a_table_that_ends_in_text_without_end(tmp_path: Path) -> None:
    begun = time.process_time()
    got = read(tmp_path, "step,loss\n1,0.5\n2,0.25\n" + '"' + "a\n" * 600_000, "x.csv")
    assert got.steps == [1, 2]
    assert any("the rest is left out" in notice for notice in got.notices)
    assert time.process_time() - begun < 20


def test_a_list_of_numbers_that_is_longer_than_any_run(tmp_path: Path) -> None:
    begun = time.process_time()
    with pytest.raises(LogError, match="no row of numbers"):
        read(tmp_path, '{"step": 1, "loss": [' + "1.5," * 2_000_000 + "1]}", "x.json")
    assert time.process_time() - begun < 10
