"""The session of ttsem is in force inside the ops, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compiled.session import session

torch_op = pytest.importorskip("kernels.norm.torch_op", reason="triton is not installed")
pytestmark = pytest.mark.compiled


def test_an_op_sees_a_gpu_and_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that takes the interpreter's tiles, or whose uninitialised outputs are not filled with NaN."""
    observed = []

    def outputs(x: torch.Tensor, *args: object) -> torch.Tensor:
        observed.append((x.device.type, torch.isnan(torch.empty(3)).all(), torch.isnan(x.new_empty(3)).all()))
        return plain(x, *args)

    plain = torch_op._dropout_fake
    monkeypatch.setattr(torch_op, "_dropout_fake", outputs)
    with session() as outer:
        with session() as inner:
            torch.ops.fused_gpt.dropout(torch.ones(4, 16), torch.tensor(1), 0.5)
        torch.ops.fused_gpt.dropout(torch.ones(4, 16), torch.tensor(1), 0.5)
    assert observed == [("cuda", True, True)] * 2
    assert (outer.launches, inner.launches) == (1, 1)


OPS = """
import importlib
import torch
from kernels.registry import SPECS
from tests.compiled.session import NAMESPACE, session
with session():
    for family in {spec.family for spec in SPECS.values()}:
        importlib.import_module(f"kernels.{family}.torch_op")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{NAMESPACE}::"):
            print(name, "session.py" in torch._C._dispatch_dump(name))
"""


def test_every_op_is_in_a_session() -> None:
    """A family that a session leaves out: its ops take the interpreter's tiles, and nothing fails."""
    done = subprocess.run(
        [sys.executable, "-c", OPS], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ops = dict(line.split() for line in done.stdout.splitlines())
    assert len(ops) > 10
    assert set(ops.values()) == {"True"}, ops
