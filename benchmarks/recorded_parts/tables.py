"""Calls held against labels, and the tables of `benchmarks/recorded.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from recorded_parts.variants import FACTORS, Call, Threshold  # type: ignore[import-not-found] # found beside the script

Calls = Mapping[str, Call | None]  # by run; None: it could not be read
_LEVELS = ("ok", "warn", "crit")
_RIGHT = ("caught", "silent", "within")
_FIGURES = {
    "crit_recall": "crit caught",
    "crit_premature": "premature",
    "warn_recall": "warn caught",
    "ok_silent": "ok silent",
    "false_critical": "false critical",
    "disputed_within": "disputed within",
}
_JUDGED = ("crit_recall", "warn_recall", "ok_silent", "false_critical")
_FAMILY_COLUMNS = ("runs", "wrong", "all others: crit / warn caught / ok silent / false critical")
_GOOD = {
    "crit_recall": 1,
    "crit_premature": -1,
    "warn_recall": 1,
    "ok_silent": 1,
    "false_critical": -1,
    "disputed_within": 1,
}


class Run(NamedTuple):
    """One row of labels.csv.

    Attributes:
        name: what the run is called.
        file: its log, in the folder of the labels.
        severity: ok, warn, crit, or disputed.
        readings: what the two readings of its curves say; they are the same where it is not disputed.
        label: what is wrong with it, in a word.
        trouble: the first bad step; infinity where there is none.
        by: the latest step at which an alarm is of use.
        steps_per_row: of a log that does not number its rows.
        family: the repository or collection that it comes from.
    """

    name: str
    file: str
    severity: str
    readings: tuple[str, str]
    label: str
    trouble: float
    by: float
    steps_per_row: int
    family: str


def outcome(run: Run, call: Call | None) -> str:
    """Return what a call comes to: caught, silent and within are right."""
    return "unread" if call is None else _OUTCOMES[run.severity](run, call, min(run.by, 1e18))


def _crit(run: Run, call: Call, by: float) -> str:
    if call.critical <= by:
        return "premature" if call.critical < run.trouble else "caught"
    return "late" if call.critical < math.inf else "softened" if call.alarm <= by else "missed"


def _warn(_: Run, call: Call, by: float) -> str:
    if call.critical < math.inf:
        return "over"
    return "caught" if call.alarm <= by else "late" if call.alarm < math.inf else "missed"


def _ok(_: Run, call: Call, __: float) -> str:
    if call.critical < math.inf:
        return "false critical"
    return "silent" if call.alarm == math.inf else "false warning"


def _disputed(run: Run, call: Call, _: float) -> str:
    said = 2 if call.critical < math.inf else int(call.alarm < math.inf)
    low, high = sorted(map(_LEVELS.index, run.readings))
    return "within" if low <= said <= high else "outside"


_OUTCOMES = {"crit": _crit, "warn": _warn, "ok": _ok, "disputed": _disputed}


def is_right(run: Run, call: Call | None) -> bool:
    """Return whether it is called what it is, in time and not before its trouble."""
    return outcome(run, call) in _RIGHT


def counts(runs: Iterable[Run], calls: Calls) -> dict[str, tuple[int, int]]:
    """Return by figure (how many, of how many)."""
    found = {figure: [0, 0] for figure in _FIGURES}
    for run in runs:
        call, result = calls[run.name], outcome(run, calls[run.name])
        hits = {
            "crit": {"crit_recall": result in ("caught", "premature"), "crit_premature": result == "premature"},
            "warn": {
                "warn_recall": call is not None and call.alarm <= min(run.by, 1e18),
                "false_critical": result == "over",
            },
            "ok": {"ok_silent": result == "silent", "false_critical": result == "false critical"},
            "disputed": {"disputed_within": result == "within"},
        }[run.severity]
        for figure, hit in hits.items():
            found[figure][0] += hit
            found[figure][1] += 1
    return {figure: (hits, of) for figure, (hits, of) in found.items()}


def figures(runs: Iterable[Run], calls: Calls) -> dict[str, float | None]:
    """Return the shares, as score_recorded.py defines them; None where there is no such run."""
    return {figure: round(hits / of, 3) if of else None for figure, (hits, of) in counts(runs, calls).items()}


def score(runs: Iterable[Run], calls: Calls) -> float:
    """Return one number to choose by: the mean of critical and warning recall, silence, and no false criticals."""
    found = figures(runs, calls)
    parts = [found["crit_recall"], found["warn_recall"], found["ok_silent"]]
    if found["false_critical"] is not None:
        parts.append(1 - found["false_critical"])
    known = [part for part in parts if part is not None]
    return sum(known) / len(known) if known else 0.0


def change(runs: Sequence[Run], plain: Calls, other: Calls) -> str:
    """Return what another set of calls gains and loses, in runs; "" for nothing."""
    before, after = counts(runs, plain), counts(runs, other)
    parts = [f"{_FIGURES[f]} {after[f][0] - before[f][0]:+d}" for f in _FIGURES if after[f][0] != before[f][0]]
    return ", ".join(parts)


def row(found: Mapping[str, float | None]) -> str:
    """Return figures as the cells of a row."""
    return " | ".join(_share(found[figure]) for figure in _FIGURES)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def head(first: str, *more: str) -> str:
    """Return the head of a table of figures."""
    names = [first, *_FIGURES.values(), *more]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def print_books(whole: Mapping[str, Any]) -> None:
    """Print a row for every rulebook and package."""
    severities = ", ".join(f"{count} {severity}" for severity, count in whole["severities"].items())
    print(f"{whole['runs']} runs ({severities}), {whole['unread']} of them not read\n")
    print(head("", "CPU s"))
    for name, found in whole["books"].items():
        cells = f"{row(found)} | {found['cpu_s']:.1f}" if found else "not installed" + " |" * 6
        print(f"| {name} | {cells} |")


def print_families(whole: Mapping[str, Any]) -> None:
    """Print what each family is by itself, and all others without it."""
    print(f"\n## guarded: each family by itself, and all others without it\n\n{head('family', *_FAMILY_COLUMNS)}")
    for family, found in whole["families"].items():
        others = " / ".join(_share(found["others"][f]) for f in _FIGURES if f in _JUDGED)
        cells = [str(found["runs"]), ", ".join(found["wrong"]) or "-", others]
        print(f"| {family} | {row(found['alone'])} | " + " | ".join(cells) + " |")
    print("\nThe most that any one family holds up:")
    plain = whole["books"]["guarded"]
    for figure, words in _FIGURES.items():
        known = {
            f: found["others"][figure] for f, found in whole["families"].items() if found["others"][figure] is not None
        }
        if known and plain[figure] is not None:
            worst = min(known, key=lambda family: _GOOD[figure] * known[family])
            print(f"- {words}: {plain[figure]:.2f}, without {worst} {known[worst]:.2f}")


def print_rules(whole: Mapping[str, Any]) -> None:
    """Print where each rule fires in time, and what hangs on it alone."""
    print("\n## guarded: each rule. Fires: at a warning or above; in time: on a crit or warn run, by must_by\n")
    print(
        "| rule | families, in time | runs, in time | ok runs | right only with it | wrong only with it |\n"
        + "|---" * 6
        + "|"
    )
    silent = []
    for name, found in whole["rules"].items():
        if not found["fires"]:
            silent.append(name)
            continue
        cells = [str(len(found["families"])), str(found["runs"]), str(found["ok"])]
        cells += [", ".join(found[key]) or "-" for key in ("right_with", "wrong_with")]
        mark = f" ({found['families'][0]} alone)" if len(found["families"]) == 1 else ""
        print(f"| {name}{mark} | " + " | ".join(cells) + " |")
    print(f"\nNever found, not even as a notice: {', '.join(silent) or 'none'}")


def print_left_out(whole: Mapping[str, Any]) -> None:
    """Print the leave-one-family-out figures beside the plain ones."""
    left = whole["left_out"]
    print(f"\n## guarded: leave one family out\n\n{head('')}")
    print(f"| plain: everything was seen | {row(left['plain'])} |")
    print(f"| without the rules that fire in no other family | {row(left['rules'])} |")
    print(f"| one scale for all thresholds, chosen on the others | {row(left['scale'])} |")
    for factor, found in left["scales"].items():
        print(
            f"| all thresholds x{factor} (chosen for {found['chosen']} of {left['families']} families) | {row(found)} |"
        )
    for family, rules in left["dropped"].items():
        print(f"\nIn time in {family} alone: {', '.join(rules)}", end="")
    print(
        "\n\nThe rules were written with these runs in sight: none of these says what new runs give. A rule that is a"
    )
    print("definition (no parameter takes a gradient, the loss is NaN) needs no second family to be right; others do.")


def print_otherwise(whole: Mapping[str, Any]) -> None:
    """Print the figures of the same runs, logged otherwise."""
    print(f"\n## guarded: the same runs, logged otherwise; labels as they are\n\n{head('')}")
    print(f"| as they are | {row(whole['books']['guarded'])} |")
    for name, found in whole["otherwise"].items():
        print(f"| {name} | {row(found)} |")


def print_thresholds(whole: Mapping[str, Any]) -> None:
    """Print what each threshold of the diagnosis changes when it alone is moved."""
    found = whole["thresholds"]
    changing = f"{found['moves']} moves of {found['count']} thresholds; {len(found['changes'])} change a figure"
    print(
        f"\n## guarded: each threshold of rules/diagnosis.yaml by itself, further out (x1.25) or nearer\n\n{changing}\n"
    )
    print("| threshold | value | " + " | ".join(f"x{factor}" for factor in FACTORS) + " |")
    print("|---" * (2 + len(FACTORS)) + "|")
    for entry in found["changes"]:
        cells = [entry["factors"].get(str(factor), "") for factor in FACTORS]
        print(f"| {entry['threshold']} | {entry['value']:g} | " + " | ".join(cells) + " |")


def print_wrong(whole: Mapping[str, Any]) -> None:
    """Print the runs that the guarded rulebook has wrong."""
    print("\n## guarded: where it goes wrong\n")
    print("| run | label | is | comes to | alarm | critical | trouble | must_by |\n" + "|---" * 8 + "|")
    for entry in whole["wrong"]:
        print("| " + " | ".join("-" if cell is None else str(cell) for cell in entry.values()) + " |")


def called_in(threshold: Threshold) -> str:
    """Return what to call a threshold: its rule, and where in it."""
    return ".".join((threshold.rule, *map(str, threshold.path)))
