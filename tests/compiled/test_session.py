"""The session of ttsem is in force inside the ops, too."""

from __future__ import annotations

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
