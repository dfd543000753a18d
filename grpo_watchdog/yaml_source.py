"""YAML with places: plain data, and for each piece of it the file, line and column where it stands.

YAML 1.2 as ruamel.yaml reads it (`1e-6` is a number, `on` is a word). Anchors, aliases, tags, duplicate keys
and several documents are refused: a rulebook is one page that reads the same to a person and to a machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from grpo_watchdog.errors import Problem, RulebookError

Place = tuple[str, int, int]
Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"


class Source:
    """One parsed file.

    Attributes:
        data: plain dicts, lists, strings, numbers, booleans and None.
        places: path into `data` to (file, line, column), 1-based.
    """

    def __init__(self, path: Path) -> None:
        """Read and parse.

        Raises:
            RulebookError: the file is absent, too large, not UTF-8 or not plain YAML; says all it found.
        """
        self.name = str(path)
        self.places: dict[Key, Place] = {(): (self.name, 1, 1)}
        self._problems: list[Problem] = []
        self._seen: set[int] = set()
        root = self._compose(path)
        self.data: Any = None if root is None else self._build(root, ())
        if self._problems:
            raise RulebookError(self._problems)

    def place(self, key: Key) -> Place:
        """Return where a path stands, or where the nearest parent does that stands anywhere."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def _compose(self, path: Path) -> Any:  # noqa: ANN401
        try:
            raw = path.read_bytes()
            if len(raw) > MAX_BYTES:
                raise _fault(self.name, f"{len(raw)} bytes; a rulebook has at most {MAX_BYTES}")
            yaml = YAML(typ="safe", pure=True)
            yaml.max_depth = 20
            return yaml.compose(raw.decode("utf-8-sig"))
        except OSError as error:
            raise _fault(self.name, f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise _fault(self.name, f"byte {error.start} is not UTF-8", line) from error
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            text = " ".join(filter(None, (error.problem, error.context)))
            raise _fault(self.name, f"not YAML: {text}", line, column) from error
        except (YAMLError, RecursionError, ValueError) as error:
            raise _fault(self.name, f"not YAML: {str(error).splitlines()[0]}") from error

    def _build(self, node: Any, key: Key) -> Any:  # noqa: ANN401
        mark = node.start_mark
        self.places[key] = place = (self.name, mark.line + 1, mark.column + 1)
        if id(node) in self._seen or node.anchor:
            self._problems.append(Problem(*place, "anchors and aliases are not allowed; write it out"))
            return None
        self._seen.add(id(node))
        if isinstance(node, ScalarNode):
            return self._scalar(node, place)
        if isinstance(node, SequenceNode):
            return [self._build(child, (*key, index)) for index, child in enumerate(node.value)]
        assert isinstance(node, MappingNode)
        built: dict[str, Any] = {}
        for name_node, child in node.value:
            name = str(name_node.value) if isinstance(name_node, ScalarNode) else None
            at = (self.name, name_node.start_mark.line + 1, name_node.start_mark.column + 1)
            if name is None:
                self._problems.append(Problem(*at, "a key must be a plain word"))
            elif name in built:
                first = self.places[(*key, name)][1]
                self._problems.append(Problem(*at, f"key {name!r} stands twice, first in line {first}"))
            else:
                built[name] = self._build(child, (*key, name))
                if not isinstance(child, ScalarNode):
                    self.places[(*key, name)] = at
        return built

    def _scalar(self, node: Any, place: Place) -> Any:  # noqa: ANN401
        kind = str(node.tag).removeprefix(_TAG)
        text: str = node.value
        try:
            if kind == "int":
                return int(text.replace("_", ""), 0) if len(text) < 40 else float(text)  # noqa: PLR2004
            if kind == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind not in ("str", "timestamp"):
            self._problems.append(Problem(*place, f"tag {node.tag} is not allowed; plain values only"))
        return text


def _fault(name: str, message: str, line: int = 1, column: int = 1) -> RulebookError:
    return RulebookError([Problem(name, line, column, message)])
