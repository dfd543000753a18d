"""The README is true: its hook runs, its report excerpt is what the command prints, its rulebook page is a rulebook."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grpo_watchdog as gw
from grpo_watchdog import examples
from grpo_watchdog.cli import main
from test_reports import INCIDENT

ROOT = Path(__file__).resolve().parent.parent


def block(name: str, language: str, number: int = 1) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = list(re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL))[number - 1]
    return found.group(1)


def test_the_line_for_a_trainer_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from grpo_watchdog.lab.trl_toy import toy_trainer  # noqa: PLC0415

    trainer = toy_trainer(tmp_path, max_steps=4)
    exec(block("README.md", "python", 1), {"trainer": trainer})  # noqa: S102 - our own page
    assert trainer.state.global_step == 4
    assert (tmp_path / "grpo_watchdog" / "journal.jsonl").exists()


def test_the_hook_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def train_one_step() -> dict[str, Any]:
        loss = policy(torch.ones(3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(1)
        return {"loss": loss, "log_ratio": 0.0 if len(seen) < 40 else 50.0, "std_reward": 0.2}

    seen: list[int] = []
    names: dict[str, Any] = {
        "policy": policy,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "config": SimpleNamespace(beta=0.1, epsilon=0.2),
        "sampler": torch.Generator(),
        "steps": 60,
        "train_one_step": train_one_step,
    }
    monkeypatch.chdir(tmp_path)
    code = block("README.md", "python", 2)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(code, names)  # noqa: S102 - it is our own README
    names["dog"].close()
    assert gw.read_run("runs/exp1").rows == names["verdict"].step + 1


def test_the_report_excerpt_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with gw.Watchdog("documented", run_dir="runs/exp1") as dog:
        dog.observe(1200, INCIDENT)
    excerpt = re.search(
        r"<!-- report.*?-->\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert excerpt is not None
    assert gw.report("runs/exp1").startswith(excerpt.group(1))


def test_the_rulebook_in_the_docs_is_a_rulebook(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("docs/rulebooks.md", "yaml"), encoding="utf-8")
    book = gw.load(path)
    count, failures = examples.run(book)
    assert count > 10
    assert failures == []
    assert "kl_penalty" not in book.rules


def test_the_page_of_metrics_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert page.endswith(capsys.readouterr().out)


def test_the_page_of_trl_has_the_table_of_its_keys() -> None:
    from grpo_watchdog.names.trl_keys import as_markdown  # noqa: PLC0415

    page = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    assert page.split("<!-- keys", 1)[1].split("-->\n", 1)[1] == as_markdown()


def test_the_page_of_trl_names_every_metric_that_is_computed() -> None:
    import inspect  # noqa: PLC0415

    from grpo_watchdog.integrations import trl_stats  # noqa: PLC0415

    page = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    source = inspect.getsource(trl_stats)
    computed = [name for name in gw.METRICS if f'"{name}"' in source]
    assert len(computed) > 20
    assert [name for name in computed if f"`{name}`" not in page.split("<!-- keys")[0]] == []


POLICIES = {
    "nobody watches": "none",
    "**guarded**": "guarded",
    "documented, verbatim": "documented",
    "halt at the first alarm": "halt_at_alarm",
    "random actions": "random",
    "learning rate / 10 only": "lr_only",
    "rollback only": "rollback_only",
    "oracle, which knows the fault": "oracle",
}


def rows_of(name: str, first: str) -> dict[str, list[str]]:
    """Return the table whose header begins with a word: first cell to the others, without the counts in brackets."""
    text = (ROOT / name).read_text(encoding="utf-8")
    table = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in (cells[0], *cells[2:])}


def test_the_table_of_policies_is_that_of_the_benchmark() -> None:
    measured = rows_of("docs/rescue.md", "policy")
    names = measured.pop("policy")
    shown = rows_of("README.md", "policy")
    del shown["policy"]
    assert set(shown) == set(POLICIES)
    for title, cells in shown.items():
        of = {name: cell.split(" ")[0] for name, cell in zip(names, measured[POLICIES[title]], strict=True)}
        kept = f"{of['no harm: mean']} ({of['5 %']})"
        wanted = [of["in reach"], of["rescue"], kept, of["false per 20,000"], of["recall"], of["delay"]]
        assert cells == [*wanted, of["cause right"]], title


def test_the_docs_name_every_kind_action_and_policy_field() -> None:
    text = (ROOT / "docs/rulebooks.md").read_text(encoding="utf-8")
    from grpo_watchdog.actions import ACTIONS  # noqa: PLC0415
    from grpo_watchdog.detectors import KINDS  # noqa: PLC0415

    for name in (*KINDS, *ACTIONS, *gw.Policy.model_fields):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("name", ["plain_loop.py", "trl_grpo.py"])
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    import runpy  # noqa: PLC0415

    scripts = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
    assert scripts == ["plain_loop.py", "trl_grpo.py"], "give every example a line here"
    example = runpy.run_path(str(ROOT / "examples" / name))
    end = example["main"](tmp_path / "run")
    if name == "plain_loop.py":
        assert not end.halt
        assert gw.read_run(tmp_path / "run").verdict == "critical"
    else:
        assert end["ruined"] < end["healthy"] / 2
        assert end["rescued"] > 0.9 * end["healthy"]
