"""Examples: the tests that live beside the rules, run against the whole rulebook."""

from __future__ import annotations

from typing import NamedTuple

from grpo_watchdog.dose import wanted
from grpo_watchdog.findings import Findings
from grpo_watchdog.metrics import Intake
from grpo_watchdog.rule import Example
from grpo_watchdog.rulebook import Rulebook


class Failure(NamedTuple):
    """One example that came out otherwise."""

    rule: str
    number: int
    expected: str
    got: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.rule}, example {self.number}: expected {self.expected}, got {self.got}"


def run(book: Rulebook) -> tuple[int, list[Failure]]:
    """Run every example of a rulebook; return how many there are, and those that failed."""
    count, failures = 0, []
    for rule_id, rule in book.rules.items():
        for number, example in enumerate(rule.examples, start=1):
            count += 1
            got, doses = _play(book, rule_id, example)
            if got != example.expect:
                failures.append(Failure(rule_id, number, example.expect, got))
            elif example.do is not None and doses != {k: float(v) for k, v in example.do.items()}:
                failures.append(Failure(rule_id, number, f"doses {example.do}", f"{doses}"))
    return count, failures


def _play(book: Rulebook, rule_id: str, example: Example) -> tuple[str, dict[str, float]]:
    intake, findings = Intake(), Findings(book)
    rows = example.rows * example.repeat
    for number, row in enumerate(rows):
        step, _ = intake.read(number, row)
        findings.detect(step)
    severity = next((f.severity for f in findings.firing if f.rule == rule_id), "ok")
    blind = {b.rule for b in findings.blind()}
    doses = {name: want.target for name, want in wanted(book, findings.firing).items()}
    return ("blind" if severity == "ok" and rule_id in blind else severity), doses
