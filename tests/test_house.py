"""The laws of the house that no linter knows: light imports, small files, honest names."""

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import grpo_watchdog

PACKAGE = Path(__file__).resolve().parent.parent / "grpo_watchdog"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ["numpy", "pandas", "tensorboard", "torch", "transformers"]
NOBODYS = {"base", "common", "core", "helpers", "manager", "utils"}  # names that say nothing

MAX_LINES_OF_A_FILE = 300
MAX_LINES_OF_A_FUNCTION = 60
MAX_IMPORT_SECONDS = 0.5
MOST_TIMES_THE_LIBRARY = 8  # what asyncio and the like take says how slow, or busy, the machine is

IMPORT = f"""
import json, sys, time
start = time.process_time()
import grpo_watchdog
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules]]))
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, without those of the docstring."""
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return length
    docstring = function.body[0]
    return length - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def import_afresh() -> tuple[float, list[str]]:
    """Seconds that the import took in a new process, and the heavy packages it brought along."""
    run = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, encoding="utf-8")
    seconds, heavy = json.loads(run.stdout)
    return seconds, heavy


def test_the_import_is_light() -> None:
    runs = [import_afresh() for _ in range(3)]
    best = min(seconds for seconds, _ in runs)
    print(f"import grpo_watchdog: {best:.3f} s, the best of {len(runs)}")

    assert [heavy for _, heavy in runs] == [[]] * len(runs)
    library = (
        "import time; t = time.perf_counter(); import json, logging, typing, asyncio; print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", library]
    bare = min(float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3))
    print(f"some of the standard library: {bare:.3f} s")
    assert best < max(MAX_IMPORT_SECONDS, MOST_TIMES_THE_LIBRARY * bare)  # a machine may be busy, or slow


def test_the_public_names_are_sorted() -> None:
    assert list(grpo_watchdog.__all__) == sorted(set(grpo_watchdog.__all__))


@pytest.mark.parametrize("name", grpo_watchdog.__all__)
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    public = getattr(grpo_watchdog, name)

    if inspect.isroutine(public) or inspect.isclass(public):
        # A class would inherit its parent's docstring through inspect.getdoc.
        assert (public.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_small(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES_OF_A_FILE


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_small(file: Path) -> None:
    long = {
        f"{function.name}, line {function.lineno}": lines_of(function)
        for function in functions(file)
        if lines_of(function) > MAX_LINES_OF_A_FUNCTION
    }

    assert not long


def test_every_module_is_named_by_what_it_is_about() -> None:
    modules = {part.removesuffix(".py") for file in FILES for part in Path(name_of(file)).parts}

    assert not {module.strip("_") for module in modules} & NOBODYS
