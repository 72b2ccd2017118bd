"""The files around the code: what the wheel ships, and the versions and commands that are stated twice."""

from __future__ import annotations

import re
import tomllib
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
