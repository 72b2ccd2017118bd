"""Kernels compiled ahead of time, without a GPU, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.candidates import FORMS
from kernels.registry import SPECS
from kernels.tuning import SHARED_MEMORY, gelu_backward_tile, gelu_programs, norm_backward_tile, norm_programs

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
ROOT = Path(__file__).parents[2]
FAMILIES = sorted({spec.family for spec in SPECS.values()})


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process without the interpreter of Triton, after its end."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def printed(code: str) -> list[str]:
    """The lines that `code` prints."""
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def report(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of `python -m bench.aot`, which must exit with 0: no build is broken."""
    path = folder / "report.json"
    done = python("-m", "bench.aot", *arguments, "--json", str(path))
    broken = "\n".join(line for line in done.stdout.splitlines() if "BROKEN" in line)
    assert done.returncode == 0, broken + done.stderr
    return json.loads(path.read_text(encoding="utf-8"))["builds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        (90, "bf16-D64"),
        (80, "bf16-D64"),
    ],
)
def test_attention_in_bfloat16(architecture: int, match: str, tmp_path: Path) -> None:
    """A kernel of attention at D = 64 spills, exceeds shared memory, or has no MMA (on sm_90 HGMMA).

    `python -m bench.aot --gated`, which .ci/run ends with, gates the same builds.
    """
    flags = ("--op", "attention", "--arch", str(architecture), "--gated", "--match", match)
    rows = report(tmp_path, *flags)
    assert {row["kernel"] for row in rows} >= {
        f"_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkdv")
    }
    for row in rows:
        assert row["hmma" if architecture == 80 else "hgmma"] > 0
        assert row["stack"] == 0


@pytest.mark.slow
def test_persistent_programs_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More programs than a multiprocessor holds at once: the last ones start after the others have ended."""
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    device, rows = torch.device("cuda"), 10**6
    flags = ("--op", "norm", "ffn", "--arch", "80", "90", "--gated", "--match", "_bwd_kernel bf16")
    for row in report(tmp_path, *flags):
        itemsize = 4 if "+fp32" in row["label"] else 2
        columns = int(re.search(r"-[CI](\d+)", row["label"])[1])
        if row["op"] == "gelu_ffn":
            tile = gelu_backward_tile(columns, itemsize)
            programs = gelu_programs(device, rows, columns, tile) * -(-columns // tile.block_n)
        else:
            dropout = "-dropout" in row["label"]
            tile = norm_backward_tile(row["architecture"], columns, itemsize, dropout=dropout)
            programs = norm_programs(device, rows, columns, tile)
        assert (row["warps"], row["stages"]) == (tile.num_warps, tile.num_stages)
        assert programs <= 132 * row["programs"], row["label"]


def test_gelu_by_tanh_does_not_divide() -> None:
    """A division in GELU by tanh: five instructions for each element, in place of two."""
    code = """
from bench.aot import builds, compile_build
for build in builds("gelu_ffn", 90):
    if build.gated and build.label.endswith("tanh"):
        text = compile_build(build, 90).asm["ptx"]
        print("div." in text, text.count("ex2.approx"), text.count("rsqrt.approx"))
"""
    assert printed(code) == 2 * ["False 16 16"]


def test_threads_get_the_same_bits_of_a_sum() -> None:
    """The first addition of a sum is fused with a multiplication, so that its two threads round differently.

    They then store different bits to one address: racecheck of compute-sanitizer reports a hazard.
    """
    code = """
import re
import torch
from bench.aot import builds, compile_build
from kernels.attention.backward import attention_backward
from kernels.tuning import attention_tiles

names = ("grad", "q", "k", "v", "out", "dq", "dk", "dv")
tensors = dict.fromkeys(names, torch.empty(2, 2, 3, 24, device="meta"))
options = {"key_start": None, "seed": None, "scale": 1.0, "dropout_p": 0.0}
tiles = attention_tiles(90, 4, 24, dropout=False, grouped=False)
launches = attention_backward(**tensors, **options, lse2=torch.empty(2, 2, 3, device="meta"), tiles=tiles)
losses = [build for build in builds("linear_cross_entropy", 90) if build.label == "fp32-V65"]
for build in (launches[0].build(""), *losses):
    text = compile_build(build, 90).asm["ptx"]
    shuffled = set(re.findall(r"shfl.sync.bfly.b32\\s+(%r\\d+)", text))
    added = re.findall(r"fma.rn.f32\\s.*(%r\\d+);", text)
    print(build.kernel.__name__, len(shuffled) > 0, len(shuffled & {*added}))
"""
    assert printed(code) == [
        "_attention_bwd_dq_kernel True 0",
        "_cross_entropy_kernel True 0",
    ]


@pytest.mark.slow
def test_a_launch_that_starts_early_waits() -> None:
    """A kernel that waits for the launch ahead before it reads its weights, or after anything else.

    The embedding must wait before it lets the next kernel start, so that an update of the weights is over.
    """
    code = """
import re
from bench.aot import builds, compile_build
for op in ("decode_embedding", "decode_block", "decode_argmax"):
    for build in builds(op, 90):
        if build.label.startswith(("bf16-C768", "bf16-B1")) and "B8" not in build.label:
            before, after = compile_build(build, 90).asm["ptx"].split("griddepcontrol.wait")
            loads, all_loads = (len(re.findall(r"ld.global.*v4", text)) for text in (before, before + after))
            early = [n for n in ("st.global", "atom", "cp.async", "launch_dependents") if n in before]
            print(build.label.split("-")[-1], loads, all_loads, *early)
"""
    assert printed(code) == [
        "C768 0 2",
        "qkv 18 21 launch_dependents",
        "attention 0 12 launch_dependents",
        "proj 12 15 launch_dependents",
        "up 18 21 launch_dependents",
        "down 6 12 launch_dependents",
        "B1 0 5 launch_dependents",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_fits(family: str, architecture: int, tmp_path: Path) -> None:
    """A tile that does not compile, or that exceeds an architecture's shared memory."""
    assert report(tmp_path, "--op", family, "--arch", str(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FORMS)
def test_every_listed_form_compiles(architecture: int) -> None:
    """A form of attention that `bench.tune` would reject, and so never compare."""
    done = python("-m", "bench.tune", "--compile_only", str(architecture))
    assert done.returncode == 0, done.stderr
    listed = sum(len(tiles) for kernels in FORMS[architecture].values() for tiles in kernels.values())
    assert len(done.stdout.splitlines()) == listed + 1
