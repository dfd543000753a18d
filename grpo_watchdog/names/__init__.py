"""Names: what each trainer's log keys mean. One file a family; a new one is a file here and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from grpo_watchdog.names.areal import AREAL
from grpo_watchdog.names.deepspeed_chat import DEEPSPEED_CHAT
from grpo_watchdog.names.diffusion import DIFFUSION
from grpo_watchdog.names.family import Family, Key
from grpo_watchdog.names.minimind import MINIMIND
from grpo_watchdog.names.ms_swift import MS_SWIFT
from grpo_watchdog.names.nemo_rl import NEMO_RL
from grpo_watchdog.names.openrlhf import OPENRLHF
from grpo_watchdog.names.own import OWN
from grpo_watchdog.names.plain import PLAIN
from grpo_watchdog.names.prime_rl import PRIME_RL
from grpo_watchdog.names.roll import ROLL
from grpo_watchdog.names.skyrl import SKYRL
from grpo_watchdog.names.slime import SLIME
from grpo_watchdog.names.trl import TRL
from grpo_watchdog.names.trl_ppo import TRL_PPO
from grpo_watchdog.names.unsloth import UNSLOTH
from grpo_watchdog.names.verl import VERL

_MOST, _LONGEST = 1000, 200  # keys that are looked at, and their characters
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        TRL, UNSLOTH, MS_SWIFT, VERL, OPENRLHF, NEMO_RL, AREAL, ROLL, PRIME_RL, SKYRL, SLIME, TRL_PPO, DIFFUSION,
        DEEPSPEED_CHAT, MINIMIND, OWN, PLAIN,
    )
}  # fmt: skip


def recognise(keys: Iterable[str]) -> Family:
    """Return the family that a log's keys speak for: by its marks, then by how much of it is known.

    Args:
        keys: of all rows that were looked at.
    """
    given = list(dict.fromkeys(key for key in keys if len(key) <= _LONGEST))[:_MOST]
    best: Family = PLAIN
    most = (0, 0, 0)
    for family in FAMILIES.values():
        names = {family.spelt(key) for key in given}
        spoken = [mark for mark in family.marks if _speaks(mark, names)]
        if spoken:
            sure = sum(mark.startswith("!") for mark in spoken)
            score = (sure, len(spoken), len(given) - len(family.unknown(given)))
            if score > most:
                best, most = family, score
    return best


def _speaks(mark: str, names: set[str]) -> bool:
    return all(_among(part, names) for part in mark.removeprefix("!").split(" & "))


def _among(part: str, names: set[str]) -> bool:
    return part in names or ("*" in part and any(fnmatchcase(name, part) for name in names))


__all__ = ["FAMILIES", "Family", "Key", "recognise"]
