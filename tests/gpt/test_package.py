"""The package: its version, and a third-party package of the same name next to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpt
import kernels

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
