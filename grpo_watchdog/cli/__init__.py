"""The command line. Exit codes of every command: 0 nothing above a notice, 10 warning, 20 critical,
1 input or rulebook unusable, 2 usage. `replay` exits 1 where a decision differs; `demo` exits 0 when it ran.
"""  # noqa: D205 - the codes are the summary

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo_watchdog import examples
from grpo_watchdog.approval import open_question, told, write_answer
from grpo_watchdog.cli import logs
from grpo_watchdog.cli.logs import EXIT, UNUSABLE
from grpo_watchdog.drill import of_script
from grpo_watchdog.errors import Problem, RulebookError, WatchdogError
from grpo_watchdog.journal import holds_a_run
from grpo_watchdog.metrics import METRICS
from grpo_watchdog.replay import replay
from grpo_watchdog.reports import FORMATS, LANGUAGES, read_run
from grpo_watchdog.rulebook import Rulebook, load, shipped

UNDRILLED = 2
_SHOWN = 20  # differences of a replay that are printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except RulebookError as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except WatchdogError as error:
        print(f"grpo-watchdog: {error}", file=sys.stderr)
        return UNUSABLE
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
    return code


def _report(options: argparse.Namespace) -> int:
    run = read_run(options.run_dir)
    rendered = FORMATS[options.format](run, options.lang)
    if options.output is None:
        print(rendered, end="")
    else:
        try:
            options.output.write_text(rendered, encoding="utf-8")
        except OSError as error:
            raise WatchdogError(f"{options.output}: {error.strerror}") from error
    return EXIT[run.verdict]


def _replay(options: argparse.Namespace) -> int:
    found = replay(options.run_dir)
    if found.torn:
        print("the journal's last line was torn (the process was killed) and is dropped")
    for step, recorded, replayed in found.differences[:_SHOWN]:
        print(
            f"step {step} differs\n  recorded: {recorded or '(no decision)'}\n  replayed: {replayed or '(no decision)'}"
        )
    print(f"{found.steps} steps decided again, {found.decisions} decisions compared, {len(found.differences)} differ")
    return UNUSABLE if found.differences else 0


def _rules_list(options: argparse.Namespace) -> int:  # noqa: ARG001
    for name in shipped():
        book = load(name)
        print(f"{name}\t{len(book.rules)} rules\t{book.title.en} / {book.title.zh}")
    return 0


def _rules_show(options: argparse.Namespace) -> int:
    book = load(options.book)
    print(f"{book.name}: {book.title.en} / {book.title.zh}\nsource: {book.source}\ndigest: {book.digest}\n")
    for rule_id, rule in book.rules.items():
        print(f"{rule_id} ({rule.kind}): {rule.title.en} / {rule.title.zh}\n  source: {rule.source}")
        for rank, level in enumerate(rule.ladder, start=1):
            doses = ", ".join(f"{name} {value:g}" if value is not True else name for name, value in level.do.items())
            print(f"  level {rank}: {level.severity}{f'; does: {doses}' if doses else ''}")
        if rule.causes:
            print(f"  causes: {', '.join(rule.causes)}")
    return 0


def _each(options: argparse.Namespace) -> list[tuple[str, Rulebook]]:
    """Return every rulebook that was named; all problems of all files at once."""
    books, problems = list[tuple[str, Rulebook]](), list[Problem]()
    for name in options.books:
        try:
            books.append((name, load(name)))
        except RulebookError as error:
            problems += error.problems
    if problems:
        raise RulebookError(problems)
    return books


def _rules_check(options: argparse.Namespace) -> int:
    for name, book in _each(options):
        print(f"{name}: good, {len(book.rules)} rules, {len(book.causes)} causes, digest {book.digest}")
    return 0


def _rules_test(options: argparse.Namespace) -> int:
    failed = 0
    for name, book in _each(options):
        count, failures = examples.run(book)
        failed += len(failures)
        for failure in failures:
            print(f"{name}: {failure}")
        print(f"{name}: {count - len(failures)} of {count} examples as expected")
    return UNUSABLE if failed else 0


def _rules_schema(options: argparse.Namespace) -> int:  # noqa: ARG001
    print(json.dumps(Rulebook.model_json_schema(by_alias=True), indent=2, ensure_ascii=False))
    return 0


def _metrics(options: argparse.Namespace) -> int:  # noqa: ARG001
    print("| metric | unit | pair | reduction | formula | normal | from |\n|---|---|---|---|---|---|---|")
    for metric in METRICS.values():
        normal = "" if metric.normal is None else f"{metric.normal[0]:g} to {metric.normal[1]:g}"
        formula = metric.formula.replace("|", "\\|")
        cells = (f"`{metric.name}`", metric.unit, metric.pair, metric.reduction, formula, normal, metric.source)
        print(f"| {' | '.join(cells)} |")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from grpo_watchdog.lab.demo import main as demo  # noqa: PLC0415 - torch is slow to load, and only the lab needs it

    demo(seed=options.seed, run_dir=options.run_dir, as_json=options.json, steps=options.steps, rules=options.rules)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from grpo_watchdog.lab.rescue import main as rescue  # noqa: PLC0415

    return rescue(
        quick=options.quick,
        as_json=options.json,
        task=options.task,
        policy=options.policy,
        fault=options.fault,
        split=options.split,
        seeds=options.seeds,
        jobs=options.jobs,
        out=options.out,
        fresh=options.fresh,
    )


def _drill(options: argparse.Namespace) -> int:
    if not options.script.is_file():
        raise WatchdogError(f"{options.script} is no file")
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # what the script prints is no JSON
        report, what = of_script(options.script, options.arguments)
    if report is None:
        print(f"grpo-watchdog: {options.script}: no drill: {what}", file=sys.stderr)
        return UNDRILLED
    print(json.dumps(report.as_json(), indent=2) if options.json else report)
    return 0 if report.passed else UNUSABLE


def _approve(options: argparse.Namespace) -> int:
    if not holds_a_run(options.run_dir):
        raise WatchdogError(f"{options.run_dir} holds no run")
    question = open_question(options.run_dir)
    if question is None:
        print(f"{options.run_dir}: nothing waits for an answer")
        return 0 if options.answer is None else UNUSABLE
    print(told(question))
    if options.answer is not None:
        write_answer(options.run_dir, question["number"], options.answer)
        print(f"answered: {options.answer}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grpo-watchdog", description="A training-health watchdog for GRPO.")
    parser.add_argument("--version", action="version", version=f"grpo-watchdog {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="watch a real run go wrong, unwatched and watched")
    demo.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    demo.add_argument("--steps", type=_above_zero, default=300, help="training steps of each run (default 300)")
    demo.add_argument(
        "--run-dir",
        type=Path,
        help="where the run folders go (default: runs/demo, or the first free of runs/demo-2, -3 ...)",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    demo.add_argument("--rules", default="guarded", help="the rulebook that acts (default guarded)")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure what the watchdog saves, and what it costs")
    _rescue_parser(bench.add_subparsers(required=True, metavar="WHAT"))

    logs.add_commands(commands)

    approve = commands.add_parser("approve", help="show what a run in the mode approve waits for, and answer")
    approve.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    approve.add_argument("answer", nargs="?", choices=("yes", "no"), help="left out: only show the question")
    approve.set_defaults(run=_approve)

    drill = commands.add_parser(
        "drill",
        help="prove on a training script that every dose, veto and rollback works, before the real run",
        description="Runs the script up to where its training begins and tries everything there; exit code 0 where "
        "nothing failed, 1 where something did, 2 where the script never got there. The watchdog's files go to a "
        "temporary folder; what the script itself writes before that, it writes.",
    )
    drill.add_argument("--json", action="store_true", help="print the proofs as JSON")
    drill.add_argument("script", type=Path, metavar="SCRIPT")
    drill.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    drill.set_defaults(run=_drill)

    report = commands.add_parser("report", help="what happened in a run, why, and what to do next")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("--format", choices=FORMATS, default="text")
    report.add_argument("--lang", choices=LANGUAGES, default="en")
    report.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    report.set_defaults(run=_report)

    again = commands.add_parser("replay", help="decide a recorded run again and compare every decision")
    again.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    again.set_defaults(run=_replay)

    metrics = commands.add_parser("metrics", help="the canonical metrics that observe understands")
    metrics.set_defaults(run=_metrics)

    rules = commands.add_parser("rules", help="list, show, check and test rulebooks")
    _rules_parser(rules.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _rescue_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rescue = commands.add_parser("rescue", help="live faults in real trainings, with and without the watchdog")
    rescue.add_argument("--quick", action="store_true", help="minutes: fewer seeds and policies")
    rescue.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    rescue.add_argument("--task", action="append", help="only this task; may be repeated")
    rescue.add_argument("--policy", action="append", help="only this policy, beside none; may be repeated")
    rescue.add_argument("--fault", action="append", help="only this fault or look-alike; may be repeated")
    rescue.add_argument("--split", choices=("development", "test"), default="test", help="which seeds (default test)")
    rescue.add_argument("--seeds", type=_above_zero, help="of every fault and severity")
    rescue.add_argument("--jobs", type=_above_zero, help="processes (default: one a core)")
    rescue.add_argument("--out", type=Path, default=Path("runs/rescue"), help="where results go (default runs/rescue)")
    rescue.add_argument("--fresh", action="store_true", help="begin anew instead of going on")
    rescue.set_defaults(run=_bench)


def _rules_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands.add_parser("list", help="the rulebooks that come with the package").set_defaults(run=_rules_list)
    show = commands.add_parser("show", help="what a rulebook says")
    show.add_argument("book", metavar="BOOK")
    show.set_defaults(run=_rules_show)
    for name, run, text in (
        ("check", _rules_check, "every problem of a rulebook, as file:line:column"),
        ("test", _rules_test, "run the examples inside a rulebook"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("books", nargs="+", metavar="FILE", help="a path, or the name of a shipped rulebook")
        command.set_defaults(run=run)
    schema = commands.add_parser("schema", help="the JSON Schema of rulebooks, for editors")
    schema.set_defaults(run=_rules_schema)


def _version() -> str:
    try:
        return version("grpo-watchdog")
    except PackageNotFoundError:
        return "of an uninstalled checkout"


def _above_zero(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
