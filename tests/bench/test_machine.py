"""The header of a report: the machine, and the ptxas that assembles the kernels."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench.machine
from bench import table
from bench.record import Machine, Report, load
from tests.bench.reports import MACHINE


def describe_gpu(major: int, minor: int, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The description of a machine with an invented GPU."""
    properties = SimpleNamespace(name="Invented GPU", major=major, minor=minor, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(bench.machine, "_driver", lambda: "1.0")
    return bench.machine.describe(torch.device("cuda"))


def install(path: Path, version: str) -> str:
    """A fake ptxas, which states its version as NVIDIA's does."""
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.80'\n", "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("major", "variable"), [(9, "TRITON_PTXAS_PATH"), (10, "TRITON_PTXAS_BLACKWELL_PATH")]
)
def test_the_ptxas_in_use_is_recorded(
    major: int, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of another ptxas than the one that Triton runs for this GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.delenv(name, raising=False)
    bundled = describe_gpu(major, 0, monkeypatch).ptxas
    assert bundled is not None
    assert bundled.endswith(" (bundled)")

    monkeypatch.setenv(variable, install(tmp_path / "ptxas", "77.5"))
    assert describe_gpu(major, 0, monkeypatch).ptxas == f"77.5 ({variable})"
    other = 19 - major
    assert describe_gpu(other, 0, monkeypatch).ptxas != f"77.5 ({variable})"
    monkeypatch.setenv(variable, str(tmp_path / "missing"))
    assert describe_gpu(major, 0, monkeypatch).ptxas == bundled
    assert bench.machine.describe(torch.device("cpu")).ptxas is None


def test_a_machine_without_ptxas_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback instead of a header where Triton, or its ptxas, is missing."""
    monkeypatch.setitem(sys.modules, "triton", None)
    about = describe_gpu(9, 0, monkeypatch)
    assert about.ptxas is None
    assert "ptxas" not in table.machine(about)


@pytest.mark.parametrize(
    ("architecture", "ptxas", "warned"),
    [
        ("sm_90", "12.8 (bundled)", True),
        ("sm_90", "13.0 (TRITON_PTXAS_PATH)", True),
        ("sm_90", "13.1 (TRITON_PTXAS_PATH)", False),
        ("sm_90", "14.0 (bundled)", False),
        ("sm_80", "12.8 (bundled)", False),
        ("sm_100", "12.9 (bundled)", False),
    ],
)
def test_an_old_ptxas_is_warned_of_for_wgmma(architecture: str, ptxas: str, warned: bool) -> None:
    """A ptxas that can miscompile wgmma goes unnoticed, or a warning on a GPU without wgmma."""
    header = table.machine(replace(MACHINE, architecture=architecture, ptxas=ptxas))
    assert f"triton 3.7.1, ptxas {ptxas}" in header
    assert ("WARNING: below 13.1 it can miscompile wgmma" in header) == warned
    assert "\n" not in header


def test_older_reports_have_no_ptxas(tmp_path: Path) -> None:
    """A report from before the field, refused; or the field lost in a file."""
    path = tmp_path / "report.json"
    content: dict[str, Any] = vars(Report("old", MACHINE))
    Report(**content).save(path)
    text = path.read_text("utf-8")
    assert '"ptxas": null' in text
    path.write_text(text.replace(',\n  "ptxas": null', ""), "utf-8")
    assert "ptxas" not in path.read_text("utf-8")
    assert load(path).machine == MACHINE
    newer = replace(MACHINE, ptxas="13.1 (bundled)")
    Report("new", newer).save(path)
    assert load(path).machine == newer
