"""The notebooks of gpt/examples: their cells run in order, and they are stored without results."""

from __future__ import annotations

import json
import linecache
from pathlib import Path
from typing import Any

import pytest

from kernels import dispatch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "gpt" / "examples").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.filterwarnings("ignore::kernels.FallbackWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails, training that does not beat the bigram model, or a lesson that its figures deny."""
    monkeypatch.setattr(dispatch, "interpreting", False)  # the references run, as on any CPU
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(notebook, "code")):
        source, place = "".join(cell["source"]), f"{notebook.name}, cell {number}"
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        exec(compile(source, place, "exec"), names)
    assert names["gpt_loss"] < names["bigram_loss"] - 0.5
    assert names["norms"][False][0] < 1e-6 * names["norms"][True][0]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(notebook: Path) -> None:
    """Results of somebody's run in the file, or a cell that is too long to read at a glance."""
    for cell in cells(notebook, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert len(cell["source"]) <= 15
