"""Bugs that Triton's interpreter misses, and that the execution of compiled kernels catches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compiled.session import session

bugs = pytest.importorskip("tests.compiled.bugs", reason="triton is not installed")
pytestmark = pytest.mark.compiled
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """For each bug, what stops its check in Triton's interpreter, which needs a process of its own."""
    command = [sys.executable, "-m", "tests.compiled.bugs"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("name", bugs.BUGS)
def test_only_the_execution_of_compiled_kernels_catches_it(name: str, interpreted: dict[str, str]) -> None:
    """A bug that neither catches, or that the interpreter catches, so that it shows nothing."""
    bug, expected = bugs.BUGS[name]
    with session():
        assert bug.compiled() == expected
    assert interpreted[name] == ""


@pytest.mark.parametrize(
    ("family", "atomic"), sorted({(bug.family, bug.atomic) for bug, _ in bugs.BUGS.values()})
)
def test_unmodified_kernels_pass(family: str, atomic: bool) -> None:
    """Checks that fail for any copy, and so seem to catch every bug."""
    checks = [
        check
        for bug, _ in bugs.BUGS.values()
        if (bug.family, bug.atomic) == (family, atomic)
        for check in bug.checks
    ]
    with session():
        assert bugs.Bug(family, checks=checks, atomic=atomic).compiled() == ""


def test_a_wrong_order_of_asynchronous_copies_changes_the_result() -> None:
    """A compiler pass that swaps a pipelined loop's buffers, which no interpreter of the source can see."""
    from ttsem import harness, mlir, validate

    from kernels.ffn.gemm import gelu_gemm_forward
    from kernels.launch import options
    from kernels.tuning import Tile

    x, w, h, a = torch.randn(32, 256), torch.randn(32, 256), torch.zeros(32, 32), torch.zeros(32, 32)
    x, w, h, a = (tensor.half() for tensor in (x, w, h, a))
    launch = gelu_gemm_forward(x=x, w=w, bias=None, h=h, a=a, tanh=True, tile=Tile(32, 32, 4, 3))
    target = harness.target_for("cpu", 80)
    mlir.enable_generic_printing()
    with session(80):
        record = harness.record_launch(
            fn=launch.kernel,
            args=(),
            kwargs={**launch.arguments, **options(launch.tile)},
            grid=launch.grid,
            orig_run=lambda *args, **options: None,
            fn_file="",
        ).record
        before, after = (harness._stage_text(record, stage, target) for stage in ("ttir", "ttgir"))
        record.post = harness.final_state(record, before)

    assert "ttg.async_copy_global_to_local" in after
    buffer, first = re.findall(r'"ttg\.memdesc_index"\((%\w+), (%\w+)\)', after)[0]
    index = re.compile(rf'("ttg\.memdesc_index"\({buffer}, )(%\w+)\)')
    second = next(slot for _, slot in index.findall(after) if slot != first)
    other = {first: second, second: first}
    swapped = index.sub(lambda match: f"{match[1]}{other.get(match[2], match[2])})", after)

    report = validate.validate_stages(record, [("ttir", before), ("ttgir", after), ("swapped", swapped)])
    assert [stage.verdict for stage in report.passes] == ["match", "match", "mismatch"]
    assert report.first_bad_pass == "swapped"
    expected = x.float() @ w.float().t()
    actual = torch.from_numpy(record.post["h_ptr"].view("float16")).reshape(32, 32).float()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-1)
