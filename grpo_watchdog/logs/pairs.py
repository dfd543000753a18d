"""Pairs: `key: number` in a line of text, whatever stands between and before them, and the step that it names."""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo_watchdog.logs.numbers import NUMBER, text_number

_ANSI = re.compile(r"\x1b(?:\[[0-?]{0,40}[ -/]{0,4}[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\))")
_RAY = re.compile(r"\([\w.:<>-]{1,80} pid=\d+(?:, ip=[\d.]+)?\)\s*")
_REPEATED = re.compile(r"\[repeated \d+x across cluster\]")
_TIME = re.compile(
    r"\[?(?<!\d)\d{4}[-/]\d\d[-/]\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?)?\]?"
    r"|(?<!\d)\d\d/\d\d/\d{4}(?!\d)|\[?(?<![\d:])\d\d:\d\d:\d\d(?:[.,]\d+)?(?![\d:])\]?"
)
_LEVEL = re.compile(r"\[?\b(?:(?:DEBUG|INFO|WARNING|SUCCESS|NOTICE)\b|[Rr]ank[ _:=]?\d+)\]?\s*:?")
_WRAPPED = re.compile(
    rf"(?:\b(?:np|numpy|torch)\.)?\b(?:u?int\d*|float\d*|bfloat16|tensor|array)\(\[?({NUMBER})\]?(?:,[^()]{{0,80}})?\)"
)
_PLACE = re.compile(r"\b[\w./-]{1,80}\.py:\d+(?::\w+)?")
_UNIT = r"(?:\s?(?:tokens?(?:/\w+)?|toks?|nats|samples?)\b)?"

_STEP = re.compile(
    r"(?i)(?<![\w/.])(?:global|train(?:ing)?|optim(?:izer)?|opt|policy|grpo|ppo|rl|gradient)?[ _-]?"
    r"(?:steps?|iterations?|iters?|updates?|it(?=\s?[:=#\[]))\b\s{0,4}[:=#]?\s{0,4}[\[(]?(\d{1,15})(?:\s?(?:/|of)\s?(\d{1,15}))?(?![\w.]|:\d)[\])]?"
)
_NO_STEP = re.compile(  # "Total steps: 500" tells of the plan
    r"(?i)\b(?:total|max\w*|num\w*|number of|warm-?up|sav\w+|logg?\w*|accumul\w+|every|each|optimization|remaining|"
    r"per|of|eval\w*)[\W_]{0,3}$"
)
_OF = re.compile(r"[\[(](\d{1,15})\s?/\s?(\d{1,15})[\])]|^\s*(\d{1,15})\s?/\s?(\d{1,15})(?=[\s:,|])")
_ROUND = re.compile(
    r"(?i)(?<![\w/.])(?:batch|rollout|episode|round|epoch|ep)\b\s{0,4}[:=#]?\s{0,4}[\[(]?(\d{1,15})(?:\s?(?:/|of)\s?(\d{1,15}))?(?![\w.])[\])]?"
)
_EPOCH = re.compile(
    r"(?i)(?<![\w/.])epochs?\s{0,4}[:=]?\s{0,4}[\[(]?(\d{1,9})(?:\s?(?:/|of)\s?(\d{1,9}))?(?![\w.])[\])]?"
)

_CUT = re.compile(r"[|,;\t│┃║]|\s-\s|\s{2,}|\s[•·–—]\s")
_PAIR = re.compile(rf"\s{{0,4}}(?::|=|->|→)\s{{0,8}}({NUMBER}){_UNIT}(?=$|[\s)\]}}])")
_TRAILS = re.compile(r"(?:tokens?|toks?|nats|samples?)(?:/\w+)?")
_MOST_WORDS_APART = 3
_OTHER_RANK = re.compile(r"\s*\[rank[1-9]\d*\]:")  # says what the first one says
_KEY = re.compile(r"[^\W\d][\w./@%#()&+^ -]{0,80}")
_EDGES = re.compile(r"^[\W\d_]+|[\s\"'`*]+$")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)")
_MOST_WORDS = 6
_VERL = re.compile(r"\bstep:(\d{1,15}) - ")
_VERL_PAIR = re.compile(rf"(.{{1,200}}?)\s?:\s?({NUMBER})")
_BAR = re.compile(
    r"(\d{1,15})/(\d{1,15}|\?)\s\[[^\[\]]{0,40}?(?:it|s|\w{1,12})/(?:it|s|\w{1,12})(?:, ([^\[\]]{1,4000}))?\]"
)
_BAR_BEGINS = re.compile(r"\d{1,3}%\|[^|]{0,200}\|")
_INNER = re.compile(r"(?i)\b(?:train|ppo|inner)\s?epoch\b|\bmake experience\b|\bgenerat")
_EVALUATION = re.compile(
    r"(?i)^\W*(?:\w{1,20}\W{1,3})?(?:eval|evaluation|evaluating|validation|valid|val|test)\b(?![/_])"
)


class Line(NamedTuple):
    """What a line tells.

    Attributes:
        style: "verl", "pairs", "bar" or "table"; "" where there are no pairs.
        step: that it names, or None.
        total: how many steps there are, as it says; 0 where it does not.
        epoch: that it names, or None.
        values: the pairs.
    """

    style: str
    step: int | None
    total: int
    epoch: int | None
    values: dict[str, float]


def cleaned(line: str) -> str:
    """Return a line without colours and without the name of the process."""
    line = line.replace("\0", "")
    if _OTHER_RANK.match(line):
        return ""
    if "\x1b" in line:
        line = _ANSI.sub("", line)
    if "pid=" in line:
        line = _REPEATED.sub("", _RAY.sub("", line))
    return line


def pairs_in(line: str) -> Line | None:
    """Return what a line tells, or None where it is part of an evaluation."""
    verl = _VERL.search(line)
    if verl:
        return Line("verl", int(verl[1]), 0, None, _verl(line[verl.end() :]))
    bar = _BAR.search(line) if "[" in line and "/" in line else None
    if bar:
        values = _pairs(bar[3], at_ease=True) if bar[3] else {}
        if values:
            before = line[: bar.start()]
            step = None if _INNER.search(before) else int(bar[1])
            return None if _EVALUATION.search(before) else Line("bar", step, 0, None, values)
        line = _BAR_BEGINS.sub(" ", line[: bar.start()]) + " " + line[bar.end() :]
    line = _LEVEL.sub(" ", _TIME.sub(" ", line.replace("−", "-")))
    if ".py:" in line:
        line = _PLACE.sub(" ", line)
    if "(" in line:
        line = _WRAPPED.sub(r"\1", line)
    if "," in line:
        line = _THOUSANDS.sub(lambda found: found[1].replace(",", ""), line)
    if _EVALUATION.search(line):
        return None
    epoch = _EPOCH.search(line)
    step, total, rest = _step(line, epoch)
    values = _pairs(rest, at_ease=step is not None)
    style = "table" if line.lstrip()[:1] in ("|", "│", "┃") and len(values) == 1 and step is None else "pairs"
    return Line(style if values else "", step, total, int(epoch[1]) if epoch else None, values)


def _step(line: str, epoch: re.Match[str] | None) -> tuple[int | None, int, str]:
    """Return the step that a line names, the number of them, and the line without it."""
    found = _STEP.search(line)
    if found is not None and _NO_STEP.search(line[: found.start()][-40:]):
        found = None
    if found is None:
        line_ = line if epoch is None else line[: epoch.start()] + " " + line[epoch.end() :]
        found = _OF.search(line_)
        if found:
            line = line_
        else:
            found = _ROUND.search(line)
    if found is None:
        return None, 0, line
    numbers = [int(group) for group in found.groups() if group]
    total = numbers[1] if len(numbers) > 1 else 0
    return numbers[0], total, f"{line[: found.start()]} | {line[found.end() :].lstrip(' :-')}"


def _verl(text: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for part in text.split(" - "):
        key, colon, text = part.strip().partition(":")
        value = text_number(text)
        if value is None and colon:
            pair = _VERL_PAIR.fullmatch(part.strip())  # a colon within the key
            key, value = (pair[1], text_number(pair[2])) if pair else (key, None)
        if value is not None:
            values[key.strip()] = value
    return values


def _pairs(text: str, *, at_ease: bool) -> dict[str, float]:
    """Return the pairs of a text; at ease where it is known that it tells of a step: `loss 0.1` is a pair then."""
    values: dict[str, float] = {}
    parts = _CUT.split(text)
    waiting = ""
    for part in parts:
        last = 0
        for pair in _PAIR.finditer(part):
            key = _key(part[last : pair.start()])
            value = text_number(pair[1])
            if key and value is not None:
                values.setdefault(key, value)
            last = pair.end()
        if last == 0:
            apart = _apart(part) if at_ease or len(parts) > 1 else {}
            alone = text_number(part) if waiting else None
            if apart:
                values.update((key, value) for key, value in apart.items() if key not in values)
            elif alone is not None:
                values.setdefault(waiting, alone)  # | loss | 0.1 |
        waiting = _key(part.removesuffix(":")) if last == 0 and part.strip() else waiting if not part.strip() else ""
    return values


def _apart(text: str) -> dict[str, float]:
    """Return the pairs of `loss 0.1 reward 0.2`; nothing where it is not made of pairs throughout."""
    values: dict[str, float] = {}
    words: list[str] = []
    for word in text.strip(" []()").split():
        value = text_number(word)
        if value is None or not words:
            words.append(word)
            continue
        key = _key(" ".join(words))
        if not key or len(words) > _MOST_WORDS_APART or text_number(words[0]) is not None:
            return {}
        values.setdefault(key, value)
        words = []
    return values if not words or (len(words) == 1 and _TRAILS.fullmatch(words[0])) else {}


def step_in(text: str) -> int | None:
    """Return the step that a text names."""
    found = _STEP.search(text)
    return int(found[1]) if found and not _NO_STEP.search(text[: found.start()][-40:]) else None


def _key(text: str) -> str:
    """Return the key that a text ends with, or ""."""
    for mark in (": ", "] ", ">>> ", "=> "):
        text = text.rpartition(mark)[2]
    text = _EDGES.sub("", text)
    if not _KEY.fullmatch(text) or text.count(" ") >= _MOST_WORDS:
        return ""
    return " ".join(text.replace(" / ", "/").split())
