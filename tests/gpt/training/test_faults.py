"""Ranks that are killed, hang, fail, differ or get signals. They run faults.py, once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="the scenarios fork")

from tests.gpt.training import faults
from tests.gpt.training.forks import needs_fork

ROOT = Path(__file__).parents[3]

pytestmark = needs_fork


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scenarios of faults.py gave, by name."""
    folder = tmp_path_factory.mktemp("faults")
    process = subprocess.run(
        [sys.executable, "-m", "tests.gpt.training.faults", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {**json.loads((folder / "results.json").read_text()), "error file": folder / "error.json"}


def lines(rank: dict[str, Any]) -> list[str]:
    """The lines with which a rank reports an error."""
    return faults.lines(rank["errors"])


def codes(ranks: list[dict[str, Any]]) -> list[int]:
    """The exit codes, as a shell shows them."""
    return [rank["code"] for rank in ranks]


def test_a_killed_rank_is_named(results: dict[str, Any]) -> None:
    """A traceback of gloo, one line of each rank that is left, or no line where rank 0 is killed."""
    killed, first, second = results["kill"]
    assert codes([killed, first, second]) == [137, 5, 5]
    assert lines(first) == ["gpt.train: rank 0 of 3 does not answer: it has ended or hangs"]
    assert "Traceback" not in first["errors"]
    assert second["errors"] == ""
    assert results["steps"]["kill"] == [2]


def test_a_rank_that_hangs_is_named_after_the_timeout(results: dict[str, Any]) -> None:
    """Ranks that wait for a day for one that does not go on, or that name one another."""
    first, stopped, last = results["hang"]
    assert codes([first, stopped, last]) == [5, 137, 5]
    assert lines(first) == ["gpt.train: rank 1 of 3 does not answer: it has ended or hangs"]
    assert "Traceback" not in first["errors"]
    assert last["errors"] == ""
    assert results["steps"]["hang"] == [2]


def test_an_unexpected_error_keeps_its_traceback(results: dict[str, Any]) -> None:
    """A bug on one rank of which the terminal shows only that the rank has ended."""
    first, second = results["bug"]
    assert codes([first, second]) == [5, 1]
    assert second["errors"].startswith("Traceback")
    assert "ZeroDivisionError" in second["errors"]
    assert lines(first) == ["gpt.train: rank 1 of 2 does not answer: it has ended or hangs"]
    assert "Traceback" not in first["errors"]


def test_signals_to_all_ranks_save_once(results: dict[str, Any]) -> None:
    """SIGTERM from a scheduler and again from torchrun, which ends ranks before they have saved."""
    first, second = results["terminated"]
    assert codes([first, second]) == [143, 143]
    assert first["output"].count("stopped at step 4, saved in") == 1
    assert first["errors"].count("stopping: finishing step 4, then saving") == 1
    assert lines(first) == []
    assert (second["output"], second["errors"]) == ("", "")
    assert results["steps"]["terminated"] == [2, 4]


def test_restarted_ranks_go_on_by_themselves(results: dict[str, Any]) -> None:
    """A restart of torchrun that begins the run again, in a new folder or from its first step."""
    restart = results["restart"]
    assert restart["begun"] == [["begun-0-0", 0], ["begun-0-1", 0], ["begun-1-0", 2], ["begun-1-1", 2]]
    assert (restart["out"], restart["steps"], restart["final"]) == ("1", [4, 6, 8], True)


def test_restarted_ranks_do_not_go_back(results: dict[str, Any]) -> None:
    """A restart that follows --resume_from again, and loses what the first attempt has saved."""
    again = results["restart from"]
    assert again["begun"] == [["begun-0-0", 4], ["begun-0-1", 4], ["begun-1-0", 6], ["begun-1-1", 6]]
    assert (again["steps"], again["final"]) == ([4, 6, 8], True)


def test_a_restarted_process_alone_goes_on(results: dict[str, Any]) -> None:
    """A run of one process under torchrun that begins again."""
    alone = results["alone"]
    assert alone["begun"] == [["begun-0-0", 0], ["begun-1-0", 2]]
    assert (alone["out"], alone["steps"], alone["final"]) == ("1", [4, 6, 8], True)


def test_a_restart_does_not_go_on_with_another_run(results: dict[str, Any]) -> None:
    """A refused --out whose checkpoints the second attempt goes on from, because it is a restart."""
    refused = results["refused"]
    assert refused["begun"] == []
    first, again, *silent = refused["reports"]
    assert first == again
    assert "holds the checkpoints of a run, expected --resume" in first[0]
    assert silent == [[], []]


def test_a_wrong_timeout_is_one_line(results: dict[str, Any]) -> None:
    """A timeout that is ignored, a traceback, or a line of every rank."""
    first, second = results["timeout"]
    assert codes([first, second]) == [2, 2]
    assert lines(first) == ["gpt.train: FUSED_GPT_RANK_TIMEOUT is 'soon', expected seconds, as in 1800"]
    assert len(first["errors"].splitlines()) == 1
    assert second["errors"] == ""


@pytest.mark.parametrize("name", ["triton", "Python"])
def test_a_rank_with_another_version_is_refused(name: str, results: dict[str, Any]) -> None:
    """Machines whose kernels are compiled by two versions of triton, or which run two versions of Python."""
    first, second = results[name]
    assert codes([first, second]) == [2, 2]
    assert lines(first)[0].startswith(f"gpt.train: rank 1: the version of {name} is '9.9', expected ")
    assert second["errors"] == ""


def test_torchrun_can_show_the_message(results: dict[str, Any]) -> None:
    """The advice to enable tracebacks, in torchrun's report, in place of what is wrong."""
    first, second = results["file"]
    assert codes([first, second]) == [2, 2]
    error = json.loads(results["error file"].read_text())
    assert lines(first) == [f"gpt.train: {error['message']}"]
    assert error["message"].startswith("grad_accum is 3, expected a multiple of 2")
    assert isinstance(error["timestamp"], int)
