"""The package: its version, and a third-party package of the same name next to it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import gpt
import kernels
from kernels import dispatch
from kernels.registry import SPECS

ROOT = Path(__file__).parents[2]


def test_a_third_party_kernels_package_is_named(tmp_path: Path) -> None:
    """An AttributeError from inside gpt when Hugging Face's `kernels` is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import gpt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: gpt: the package `kernels` at {tmp_path / 'kernels'} is not fused-gpt's"
    )
    assert "pip uninstall kernels" in last


def test_the_version_is_that_of_the_package() -> None:
    """No version to state in a report, or another one than the distribution's."""
    assert gpt.__version__ == kernels.__version__


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m gpt` that names a command which does not exist, or is wider than a terminal."""
    runpy.run_module("gpt", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    commands = re.findall(r"^  (\S+)  ", "\n".join(lines), re.MULTILINE)
    assert {"gpt.train", "gpt.sample", "gpt.eval", "gpt.info", "kernels", "bench"} == {*commands}
    assert all(find_spec(command) for command in commands)
    assert max(map(len, lines)) <= 80


def test_the_kernels_list_their_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m kernels` without an op or its reason, or with a traceback where a setting cannot be had."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "interpreting", False)
    monkeypatch.setattr(dispatch, "triton_version", (3, 7))
    runpy.run_module("kernels", run_name="__main__")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"fused-gpt {gpt.__version__}, torch {torch.__version__}, triton ")
    assert [line.split()[:2] for line in lines] == [[op, "reference"] for op in SPECS]
    assert all(line.endswith("tensors on cpu need TRITON_INTERPRET=1") for line in lines)

    with kernels.use_backend("triton"):
        runpy.run_module("kernels", run_name="__main__")
    assert capsys.readouterr().out.count("cannot be honoured: ") == len(SPECS)
