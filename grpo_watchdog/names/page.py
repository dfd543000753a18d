"""Page: the tables of names as Markdown; `python -m grpo_watchdog.names.page` prints docs/names.md."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_watchdog.names import FAMILIES, Family, Key
from grpo_watchdog.names.plain import SPELLINGS

_TOP = """\
# What the keys of a log mean

Generated from the tables in `grpo_watchdog/names/`; `tests/test_names.py` holds this page against them.

A log is read with the table of the family that its keys speak for, or that `--trainer` names. A key that the family's
table lacks is looked up in `plain`, the last one; what that lacks too is unknown: it is listed in the report, and
nothing is made of it. Where a row has two keys for one metric, the one that stands higher here counts.

`policy_loss` is taken with the sign of the loss, as it is minimised, so that loss = policy_loss + kl_coef x KL.
`token_kl` is a `kl` of which the trainer says that it is a mean per token and never below 0.
"""
_HEAD = "| key | what it is | pair | estimator | reduction | the watchdog's | missing |\n|---|---|---|---|---|---|---|"
_LIKE = {"unsloth": "trl", "ms_swift": "trl"}


def as_markdown() -> str:
    """Return the whole page."""
    parts = [_TOP.rstrip()]
    for family in FAMILIES.values():
        parts.append(f"## {family.name}: {family.title}")
        parts += [family.notes] if family.notes else []
        if family.name == "plain":
            parts.append(_spellings())
        elif family.name == "canonical":
            parts.append("The names are those of [metrics.md](metrics.md), as they are.")
        else:
            parts += _tables(family)
    return "\n\n".join(parts) + "\n"


def _tables(family: Family) -> Iterable[str]:
    like = _LIKE.get(family.name)
    above = set(FAMILIES[like].keys) if like else set()
    keys = [key for key in family.keys if key not in above]
    if like:
        yield f"As {like}." if not keys else f"As {like}, but for:"
    if keys:
        yield "\n".join([_HEAD, *(_line(key) for key in keys if key.canonical or key.estimator or key.beside)])
    others = dict.fromkeys(
        f"`{key.key}`" for key in keys if not (key.canonical or key.estimator or key.beside or key.key == "*")
    )
    if others:
        yield f"Known, and none of the watchdog's: {', '.join(others)}."


def _line(key: Key) -> str:
    ours = " and ".join(f"`{name}`" for name in (key.canonical, key.also) if name)
    told = [key.only, "" if key.factor == 1.0 else f"times {key.factor:g}"]
    told += ["" if key.join == "first" else f"{key.join} of them"]
    told += [f"beside {key.beside}" if key.beside else "", f"without {key.without}" if key.without else ""]
    ours += f" ({'; '.join(filter(None, told))})" if any(told) else ""
    cells = (f"`{key.key}`", key.means, key.pair, key.estimator, key.reduction, ours, key.when)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _spellings() -> str:
    rows = [f"| `{name}` | {', '.join(f'`{word}`' for word in words.split())} |" for name, words in SPELLINGS.items()]
    return "\n".join(["| the watchdog's | spelt |", "|---|---|", *rows])


if __name__ == "__main__":
    print(as_markdown(), end="")  # noqa: T201 - the page is its output
