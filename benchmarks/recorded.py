"""The rulebooks on recorded runs that carry labels, beside baselines; what each rule and each threshold is worth there.

    python benchmarks/recorded.py [FOLDER] [--json] [--quick]

FOLDER holds the logs and a labels.csv (name, file, severity, severity_1, severity_2, label, trouble_step, must_by,
steps_per_row, family); the default is ../shared/recorded_runs, and where that is absent there is nothing to measure.
A row is the share of critical runs called critical by must_by, of those the ones called so before the trouble began,
of warning runs warned of by must_by, of healthy runs left alone, of runs that are not critical called critical, and of
disputed runs called what one of the two readings or something between them says. Every call is taken from the rows up
to that row only. Then, for the guarded rulebook:

- each family of runs by itself and all the others without it;
- each rule: where it fires in time, and which runs are right, or wrong, only because of it;
- leave-one-family-out: each family is scored without the rules of rules/diagnosis.yaml that fire in time in no other
  family; and with one scale for all thresholds there that was chosen on the other families;
- the same runs logged otherwise: fewer rows, rewards on another scale, metrics that are not there;
- each threshold of rules/diagnosis.yaml moved by itself;
- the runs that it has wrong.

`--quick` prints the first table and the last. The published packages are optional; recorded_parts/packages.py says how
they are fed:

    pip install --no-deps rlwatch rldoctor && pip install scipy
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from recorded_parts import tables  # type: ignore[import-not-found] # found beside this script
from recorded_parts.otherwise import OTHERWISE  # type: ignore[import-not-found]
from recorded_parts.packages import PACKAGES  # type: ignore[import-not-found]
from recorded_parts.study import Measured, read_runs, recall, study  # type: ignore[import-not-found]
from recorded_parts.variants import (  # type: ignore[import-not-found]
    BOOKS,
    FACTORS,
    Call,
    book,
    diagnosis_rules,
    thresholds,
)

from grpo_watchdog.errors import WatchdogError

_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "recorded_runs"
_SCALES = (1.0, *FACTORS)


def summary(measured: Measured) -> dict[str, Any]:
    """Return the first table and the last."""
    runs, studies = measured
    books: dict[str, Any] = {}
    for name in (*BOOKS, *PACKAGES):
        calls = measured.calls(name)
        read = [run for run in runs if not studies[run.name].error]
        if read and all(calls[run.name] is None for run in read):
            books[name] = None
            continue
        seconds = sum(study.cpu.get(name, 0.0) for study in studies.values())
        books[name] = {**tables.figures(runs, calls), "cpu_s": round(seconds, 2)}
    wrong, calls = [], measured.calls("guarded")
    for run in runs:
        if not tables.is_right(run, calls[run.name]):
            alarm, critical = calls[run.name] or Call()
            steps = {"alarm": alarm, "critical": critical, "trouble": run.trouble, "must_by": run.by}
            wrong.append({"run": run.name, "label": run.label, "is": run.severity,
                          "comes_to": studies[run.name].error or tables.outcome(run, calls[run.name]),
                          **{k: int(v) if math.isfinite(v) else None for k, v in steps.items()}})  # fmt: skip
    severities = [run.severity for run in runs]
    return {
        "runs": len(runs),
        "severities": {s: severities.count(s) for s in ("crit", "warn", "ok", "disputed")},
        "unread": sum(bool(study.error) for study in studies.values()),
        "reading_cpu_s": round(sum(study.cpu.get("reading", 0.0) for study in studies.values()), 2),
        "books": books,
        "wrong": wrong,
    }


def by_family(measured: Measured) -> dict[str, Any]:
    """Return each family by itself, and all others without it."""
    calls = measured.calls("guarded")
    return {
        family: {
            "runs": len(mine),
            "alone": tables.figures(mine, calls),
            "others": tables.figures([run for run in measured.runs if run.family != family], calls),
            "wrong": [run.name for run in mine if not tables.is_right(run, calls[run.name])],
        }
        for family, mine in sorted(measured.families().items())
    }


def by_rule(measured: Measured) -> dict[str, Any]:
    """Return where each rule of the guarded rulebook fires in time, and what hangs on it alone."""
    calls, found = measured.calls("guarded"), dict[str, Any]()
    for rule in sorted(book("guarded").rules):
        entry: dict[str, Any] = {"fires": False, "families": [], "runs": 0, "ok": 0, "right_with": [], "wrong_with": []}
        for run in measured.runs:
            steps = measured.studies[run.name].fired.get(rule)
            if steps is None:
                continue
            entry["fires"] = True
            loud = min(steps.get("warning", math.inf), steps.get("critical", math.inf))
            if run.severity in ("crit", "warn") and loud <= min(run.by, 1e18):
                entry["runs"] += 1
                entry["families"] = sorted({*entry["families"], run.family})
            entry["ok"] += run.severity == "ok" and loud < math.inf
            with_, without_ = calls[run.name], measured.studies[run.name].without[rule]
            if tables.is_right(run, with_) != tables.is_right(run, without_):
                entry["right_with" if tables.is_right(run, with_) else "wrong_with"].append(run.name)
        found[rule] = entry
    return found


def left_out(measured: Measured, rules: dict[str, Any], folder: Path, jobs: int) -> dict[str, Any]:
    """Return the figures where each family is scored by what was settled on all others."""
    families, plain = measured.families(), measured.calls("guarded")
    dropped = {f: [r for r in diagnosis_rules() if rules[r]["families"] == [f]] for f in sorted(families)}
    todo = [(run, dropped[f]) for f, mine in families.items() if dropped[f] for run in mine
            if not measured.studies[run.name].error]  # fmt: skip
    with Pool(jobs) as pool:
        again = pool.map(partial(recall, folder=folder), todo, chunksize=1)
    fewer = {**plain, **{run.name: call for (run, _), call in zip(todo, again, strict=True)}}
    scales = {f: {r.name: measured.studies[r.name].scales.get(f) for r in measured.runs} for f in _SCALES}
    chosen, picked = dict.fromkeys(_SCALES, 0), dict[str, Call | None]()
    for family, mine in families.items():
        others = [run for run in measured.runs if run.family != family]
        best = max(_SCALES, key=lambda f: (tables.score(others, scales[f]), -abs(math.log(f))))
        chosen[best] += 1
        picked |= {run.name: scales[best][run.name] for run in mine}
    return {
        "families": len(families),
        "dropped": {family: gone for family, gone in dropped.items() if gone},
        "plain": tables.figures(measured.runs, plain),
        "rules": tables.figures(measured.runs, fewer),
        "scale": tables.figures(measured.runs, picked),
        "scales": {f: {**tables.figures(measured.runs, scales[f]), "chosen": chosen[f]} for f in sorted(_SCALES)},
    }


def by_logging(measured: Measured) -> dict[str, Any]:
    """Return the figures where the same runs are logged otherwise."""
    return {
        name: tables.figures(measured.runs, {n: study.otherwise.get(name) for n, study in measured.studies.items()})
        for name in OTHERWISE
    }


def by_threshold(measured: Measured) -> dict[str, Any]:
    """Return what each threshold changes when it alone is moved."""
    guarded, plain = book("guarded"), measured.calls("guarded")
    every = [threshold for name in diagnosis_rules() for threshold in thresholds(name, guarded.rules[name])]
    changes = []
    for threshold in every:
        entry: dict[str, str] = {}
        for factor in FACTORS:
            key = (threshold, factor)
            other = {name: measured.studies[name].moved.get(key, call) for name, call in plain.items()}
            text = tables.change(measured.runs, plain, other)
            if text:
                entry[str(factor)] = text
        if entry:
            changes.append({"threshold": tables.called_in(threshold), "value": threshold.value, "factors": entry})
    return {"count": len(every), "moves": len(every) * len(FACTORS), "changes": changes}


def measure(folder: Path, jobs: int, *, quick: bool) -> dict[str, Any]:
    """Return everything that is printed.

    Raises:
        ConfigurationError: the labels cannot be used.
    """
    runs = read_runs(folder)
    for name in BOOKS:
        book(name)  # read once: where processes are forked they have it
    with Pool(jobs) as pool:
        studies = pool.map(partial(study, folder=folder, quick=quick), runs, chunksize=1)
    measured = Measured(runs, {run.name: found for run, found in zip(runs, studies, strict=True)})
    whole = summary(measured)
    if not quick:
        rules = by_rule(measured)
        whole |= {"families": by_family(measured), "rules": rules, "thresholds": by_threshold(measured),
                  "otherwise": by_logging(measured),
                  "left_out": left_out(measured, rules, folder, jobs)}  # fmt: skip
    return whole


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=_FOLDER, help="logs and their labels.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="only the rulebooks and packages, and what goes wrong")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if not options.folder.is_dir():
        print(f"{options.folder} is not there: nothing to measure on", file=sys.stderr if options.json else sys.stdout)
        return
    try:
        whole = measure(options.folder, max(1, options.jobs), quick=options.quick)
    except WatchdogError as error:
        sys.exit(str(error))
    if options.json:
        print(json.dumps(whole, indent=1))
        return
    tables.print_books(whole)
    if not options.quick:
        for table in (tables.print_families, tables.print_rules, tables.print_left_out, tables.print_otherwise,
                      tables.print_thresholds):  # fmt: skip
            table(whole)
    tables.print_wrong(whole)


if __name__ == "__main__":
    main()
