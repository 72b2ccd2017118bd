"""The files around the code: what the wheel ships, and the versions and commands that are stated twice."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["kernels", "gpt", "bench"])
def test_a_package_ships_its_types(package: str) -> None:
    """A wheel without py.typed: type checkers then ignore the package's annotations."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (ROOT / package / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]


def test_data_files_that_ship_exist() -> None:
    """A pattern in package-data that matches no file: the wheel lacks a file that the code reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), (package, pattern)


def test_pre_commit_runs_the_ruff_of_ci() -> None:
    """Two versions of ruff: a commit that passes the hook fails in CI, or the reverse."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert set(re.findall(r"ruff==([\w.]+)", hooks)) == {pinned[1]}


def test_ci_runs_the_checks_of_a_developer() -> None:
    """A workflow that runs other checks than `.ci/run`, or runs them on push alone."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: bash .ci/run" in workflow
    assert "on: [push, pull_request]" in workflow


CONSTRAINTS = [f"constraints{part}.txt" for part in ("", "-oldest", "-newest", "-compiled")]


def pinned_versions(file: str) -> dict[str, str]:
    """Normalised name to version, of each line after the comment."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    pairs = [line.split("==") for line in lines[1:]]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_pin_every_requirement(file: str) -> None:
    """A dependency without an exact version: a fresh environment then differs from the tested one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[><=;\s]", requirement)[0].replace("_", "-") for requirement in wanted}
    assert names - pinned_versions(file).keys() == set()


def test_the_build_has_exact_versions() -> None:
    """A build with the newest setuptools of the day, because pip does not apply -c to the build."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    pinned = pinned_versions("constraints.txt")
    assert build["requires"] == [f"setuptools=={pinned['setuptools']}"]


def test_the_oldest_and_newest_versions_are_those_promised() -> None:
    """A promise of versions that `.ci/versions` does not run, or the other way round."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest, pinned, newest = (
        pinned_versions(f"constraints{part}.txt") for part in ("-oldest", "", "-newest")
    )
    assert f'"torch>={oldest["torch"].removesuffix(".0")}"' in project
    assert f'"triton>={oldest["triton"].removesuffix(".0")};' in project
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for versions in (oldest, pinned, newest):
        assert f"torch {versions['torch']} with Triton {versions['triton']}" in readme


def test_ttsem_gets_the_triton_that_it_executes() -> None:
    """An environment of `.ci/compiled` in which `bench.validate` refuses to run."""
    from bench.validate.command import TRITON

    assert pinned_versions("constraints-compiled.txt")["triton"] == TRITON
    assert "ttsem" in pinned_versions("constraints-compiled.txt")


@pytest.fixture
def run_ci(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs a script of `.ci/` in an empty folder: (exit status, commands run, standard error).

    The Pythons named `pythons` are on PATH. They, and what they install, only note how they are called.
    """
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci", dirs_exist_ok=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "rm", "mkdir", "cp", "grep"):
        (tools / name).symlink_to(str(shutil.which(name)))
    stub = f"""#!{shutil.which("bash")}
case "$*" in "-c import"*) exit 0 ;; esac
echo "${{0##*/}} $*" >> "{tmp_path}/log"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/pip"; cp "$0" "$3/bin/python" ;;
    list) echo "torch 1.2.3" ;;
    *pytest*) exit "${{PYTEST_STATUS:-0}}" ;;
    *bench.aot*) exit "${{GATES_STATUS:-0}}" ;;
esac
"""

    def run(script: str, *arguments: str, pythons: Sequence[str], **environment: str) -> tuple[int, str, str]:
        for python in pythons:
            (tools / python).write_text(stub, encoding="utf-8")
            (tools / python).chmod(0o755)
        done = subprocess.run(
            [tools / "bash", f".ci/{script}", *arguments],
            cwd=tmp_path,
            env={"PATH": str(tools), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        log = tmp_path / "log"
        return done.returncode, log.read_text(encoding="utf-8") if log.exists() else "", done.stderr

    return run


BOTH = ("python3.11", "python3.13")


def commands(name: str, python: str) -> str:
    gates = "python -m bench.aot --gated\n" if name == "oldest" else ""
    return (
        f"{python} -m venv .venv-{name}\n"
        f"pip install -q -c constraints-{name}.txt -e .[test]\n"
        f"pip list\n"
        f"python -m pytest -n 2 --dist worksteal\n{gates}"
    )


def test_versions_runs_both_sets(run_ci: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A set that is not tested, or that is installed from other constraints or over an old environment."""
    (tmp_path / ".venv-newest" / "old").mkdir(parents=True)
    expected = commands("oldest", "python3.11") + commands("newest", "python3.13")
    assert run_ci("versions", pythons=BOTH) == (0, expected, "")
    assert not (tmp_path / ".venv-newest" / "old").exists()


def test_versions_runs_one_set(run_ci: Callable[..., tuple[int, str, str]]) -> None:
    """An argument that is ignored, or a Python that is asked for although its set is not."""
    assert run_ci("versions", "newest", pythons=("python3.13",)) == (0, commands("newest", "python3.13"), "")


@pytest.mark.parametrize(
    ("arguments", "pythons", "message"),
    [
        ((), ("python3.11",), "PATH has no working python3.13 (newest) with venv and ensurepip"),
        ((), (), "PATH has no working python3.11 (oldest), python3.13 (newest) with venv and ensurepip"),
        (("newest", "latest"), BOTH, "argument is 'latest', expected oldest or newest"),
    ],
)
def test_versions_refuses_before_it_installs(
    arguments: tuple[str, ...],
    pythons: tuple[str, ...],
    message: str,
    run_ci: Callable[..., tuple[int, str, str]],
) -> None:
    """A missing Python or a misspelt set that is noticed only after the first set has run."""
    assert run_ci("versions", *arguments, pythons=pythons) == (2, "", f".ci/versions: {message}\n")


@pytest.mark.parametrize("failing", ["PYTEST_STATUS", "GATES_STATUS"])
def test_versions_fails_with_a_check(failing: str, run_ci: Callable[..., tuple[int, str, str]]) -> None:
    """A failing suite or a broken gate that ends in exit status 0."""
    status, log, _ = run_ci("versions", pythons=BOTH, **{failing: "1"})
    expected = commands("oldest", "python3.11")
    assert (status, log) == (
        1,
        expected if failing == "GATES_STATUS" else expected.partition("python -m bench")[0],
    )


def test_tables_of_the_gated_versions() -> None:
    """Gates that CI runs without recorded figures, or figures of a version whose gates CI does not run."""
    tables = {path.stem for path in (ROOT / "bench" / "results" / "aot").glob("*.json")}
    assert tables == {pinned_versions(f"constraints{part}.txt")["triton"] for part in ("", "-oldest")}


def test_compiled_takes_the_first_python_that_works(run_ci: Callable[..., tuple[int, str, str]]) -> None:
    """A run with a Python that ttsem does not support, or one that leaves out an architecture."""
    status, log, _ = run_ci("compiled", pythons=("python3.11", "python3.13"))
    assert status == 0
    assert log.startswith(
        "python3.13 -m venv .venv-compiled\npip install -q -c constraints-compiled.txt ttsem "
    )
    assert log.count("-m pytest -p tests.compiled.plugin -n 2 ") == 2


def test_compiled_refuses_without_a_python(run_ci: Callable[..., tuple[int, str, str]]) -> None:
    """An installation for a Python that has no ttsem."""
    message = ".ci/compiled: PATH has no working python3.12 or python3.13 with venv and ensurepip\n"
    assert run_ci("compiled", pythons=("python3.11",)) == (2, "", message)
