"""Which tests a process runs, by their markers."""

from __future__ import annotations

import pytest
import torch

from tests import conftest

INTERPRETED, GPU, EXECUTED = "interpreted", "on a GPU", "compiled, without a GPU"


@pytest.mark.parametrize(
    ("marks", "runs"),
    [
        ({"interpreter"}, {INTERPRETED}),
        ({"kernels"}, {INTERPRETED, EXECUTED}),
        ({"gpu"}, {GPU, EXECUTED}),
        ({"gpu", "kernels"}, {GPU, EXECUTED}),  # a GPU test in a module that is marked `kernels`
        ({"gpu", "kernels", "driver"}, {GPU}),
        ({"compiled"}, {EXECUTED}),
    ],
    ids=lambda value: "+".join(sorted(value)),
)
def test_markers_decide_where_a_test_runs(
    marks: set[str], runs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that its module's marker skips everywhere, on a GPU too, or that runs where it cannot."""
    monkeypatch.setattr(conftest, "HAS_TRITON", True)
    for process in (INTERPRETED, GPU, EXECUTED):
        monkeypatch.setattr(conftest, "interpreting", lambda here=process: here == INTERPRETED)
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=process: here != INTERPRETED)
        reason = conftest.obstacle(marks, executing=process == EXECUTED)
        assert (reason is None) == (process in runs), f"{process}: {reason}"
