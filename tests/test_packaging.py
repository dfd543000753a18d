"""What people install is the wheel: built from the sdist, and run with the source out of reach."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RULEBOOKS = sorted((ROOT / "rules").glob("*.yaml"))


def python(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs this Python on `path` alone.

    -P keeps the working directory off the path; -S keeps out site-packages, and with it the link
    from an editable install back to the source.
    """
    return subprocess.run(
        [sys.executable, "-P", "-S", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def dependencies() -> list[Path]:
    """The folders of installed packages, which with -S are on no path by themselves."""
    return sorted({Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))})


def check(run: subprocess.CompletedProcess[str]) -> str:
    """Returns what the run printed, which must have gone well."""
    assert run.returncode == 0, f"{run.args} failed\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the built wheel was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    target = folder / "installed"
    path = dependencies()
    # Without --wheel, `build` makes the wheel from the sdist, which shows that both are whole.
    check(
        python(
            *("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)),
            path=path,
            cwd=folder,
        )
    )
    (wheel,) = folder.glob("*.whl")
    check(
        python(
            *("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"),
            *("--no-deps", "--no-compile", "--target", str(target), str(wheel)),
            path=path,
            cwd=folder,
        )
    )
    return target


@pytest.fixture
def path(installed: Path) -> list[Path]:
    return [installed, *dependencies()]


def test_without_the_wheel_the_package_is_out_of_reach(tmp_path: Path) -> None:
    run = python("-c", "import grpo_watchdog", path=dependencies(), cwd=tmp_path)

    assert run.returncode == 1
    assert "No module named 'grpo_watchdog'" in run.stderr


def test_the_package_comes_from_the_wheel(installed: Path, path: list[Path], tmp_path: Path) -> None:
    program = "import grpo_watchdog; print(grpo_watchdog.__file__)"

    assert Path(check(python("-c", program, path=path, cwd=tmp_path)).strip()).is_relative_to(installed)


def test_the_wheel_holds_the_package_its_types_and_its_licence(installed: Path) -> None:
    source = ROOT / "grpo_watchdog"
    modules = {file.relative_to(source) for file in source.rglob("*.py")}
    shipped = {file.relative_to(installed / "grpo_watchdog") for file in (installed / "grpo_watchdog").rglob("*.py")}

    assert shipped == modules
    assert (installed / "grpo_watchdog" / "py.typed").is_file()
    assert list(installed.glob("grpo_watchdog-*.dist-info/licenses/LICENSE"))
    # Nothing lands beside the package: no tests, no rules, no stray top-level module.
    assert {entry.name.partition("-")[0] for entry in installed.iterdir() if entry.name != "bin"} == {"grpo_watchdog"}


def test_every_rulebook_ships(installed: Path) -> None:
    shipped = {file.name: file.read_bytes() for file in (installed / "grpo_watchdog" / "rules").glob("*.yaml")}

    assert RULEBOOKS, "the checkout has no rulebook"
    assert shipped == {file.name: file.read_bytes() for file in RULEBOOKS}


def test_the_command_lists_the_rulebooks(path: list[Path], tmp_path: Path) -> None:
    output = check(python("-m", "grpo_watchdog.cli", "rules", "list", path=path, cwd=tmp_path))

    assert "documented" in output


def test_the_documented_rulebook_passes_its_own_tests(path: list[Path], tmp_path: Path) -> None:
    check(python("-m", "grpo_watchdog.cli", "rules", "test", "documented", path=path, cwd=tmp_path))


def test_the_script_is_installed(installed: Path, path: list[Path], tmp_path: Path) -> None:
    script = installed / "bin" / "grpo-watchdog"

    assert "rules" in check(python(str(script), "--help", path=path, cwd=tmp_path))
