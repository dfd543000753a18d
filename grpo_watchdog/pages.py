"""Pages: which files a rulebook is made of, and how one is laid over another. Nothing here knows what a rule means.

`extends` names a shipped rulebook or a file in the same folder, nothing else: mappings are merged key by key,
everything else is replaced, and a key set to null is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_watchdog.errors import Problem, RulebookError
from grpo_watchdog.rule import no_such
from grpo_watchdog.yaml_source import Key, Places, Source

_PACKAGED = Path(__file__).parent / "rules"
_CHECKOUT = Path(__file__).parent.parent / "rules"
_DEEPEST = 8
_SUFFIXES = (".yaml", ".yml")


class Page:
    """Everything that a rulebook and those it extends say, with places; the problems of reading included.

    Attributes:
        data: the merged mapping.
        places: where each piece of it stands, in whichever file.
        problems: what is wrong with the files as such.
        spoiled: keys whose values say nothing because of these problems.
        removed: keys that a page set to null.
    """

    def __init__(self, data: dict[str, Any], places: Places) -> None:
        """Keep what was read."""
        self.data, self.places = data, places
        self.problems: list[Problem] = []
        self.spoiled: set[Key] = set()
        self.removed: set[Key] = set()


def shipped() -> list[str]:
    """Return the names of the rulebooks that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def read(book: str | Path) -> Page:
    """Return what a rulebook, by name or path, says together with those it extends.

    Raises:
        RulebookError: one of the files cannot be read, or extends what it must not.
    """
    return _merged(_find(str(book)), ())


def _folder() -> Path:
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def _find(book: str) -> Path:
    if book.endswith(_SUFFIXES) or "/" in book or "\\" in book:
        return Path(book)
    if book not in shipped():
        message = f"{no_such('rulebook', book, shipped())}, or a path ending in .yaml"
        raise RulebookError([Problem(book, 1, 1, message)])
    return _folder() / f"{book}.yaml"


def _merged(path: Path, children: tuple[Path, ...]) -> Page:
    source = Source(path)
    if not isinstance(source.data, dict):
        message = "a rulebook is a mapping with schema, name, title, source, base and rules"
        raise RulebookError([*source.problems, Problem(str(path), 1, 1, message)])
    page = Page(source.data, source.places)
    page.problems, page.spoiled = source.problems, source.spoiled
    wanted = source.data.get("extends")
    if wanted is None:
        return page
    family = (*children, path.resolve())
    try:
        below = _merged(_parent(wanted, family, source.places), family)
    except RulebookError as error:
        raise RulebookError([*page.problems, *error.problems]) from None
    _overlay(below, page, (), below.data, page.data)
    below.problems += page.problems
    below.spoiled |= page.spoiled
    return below


def _parent(wanted: object, family: tuple[Path, ...], places: Places) -> Path:
    where, path = places.value(("extends",)), family[-1]
    if wanted in shipped():
        found = (_folder() / f"{wanted}.yaml").resolve()
    else:
        found = path
        if (
            isinstance(wanted, str)
            and wanted.endswith(_SUFFIXES)
            and "\0" not in wanted
            and Path(wanted).name == wanted
        ):
            found = (path.parent / wanted).resolve()
        if found == path.parent / str(wanted) == path:
            raise RulebookError([Problem(*where, "extends itself")])
        if found == path or found.parent != path.parent or not found.is_file():
            allowed = f"{', '.join(shipped())}, or the name of a .yaml file in the same folder"
            raise RulebookError([Problem(*where, f"extends {wanted!r}, which is not to be had; allowed: {allowed}")])
    if found in family:
        circle = " extends ".join(p.name for p in (*family[family.index(found) :], found))
        raise RulebookError([Problem(*where, f"extends goes in a circle: {circle}")])
    if len(family) > _DEEPEST:
        raise RulebookError([Problem(*where, f"extends more than {_DEEPEST} deep; put what they share on one page")])
    return found


def _overlay(below: Page, above: Page, key: Key, under: dict[str, Any], over: dict[str, Any]) -> None:
    """Lay one mapping over another, in place; null removes."""
    for name, value in over.items():
        at = (*key, name)
        if isinstance(value, dict) and isinstance(under.get(name), dict):
            _overlay(below, above, at, under[name], value)
        elif value is None and name in under and at not in above.spoiled:
            del under[name]
            below.removed.add(at)
        else:
            under[name] = value
            below.removed.discard(at)
            below.places.graft(at, above.places)
