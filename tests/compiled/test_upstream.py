"""Each defect of ttsem that upstream/ reports is still there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.compiled, pytest.mark.slow]  # a process for each: run when ttsem's version changes
REPORTS = sorted(path for path in Path(__file__).with_name("upstream").glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_program_behaves_as_reported(path: Path, tmp_path: Path) -> None:
    """A report of a defect that the installed ttsem does not have, so that a workaround can go."""
    text = path.read_text(encoding="utf-8")
    (command,) = re.findall(r"Run: `python (.*)`", text)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (actual,) = re.findall(r"Actual:\n\n```text\n(.*?)```", text, re.S)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")

    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST"))
    }
    child = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    output = child.stdout + child.stderr
    for line in actual.splitlines():
        assert line in output
