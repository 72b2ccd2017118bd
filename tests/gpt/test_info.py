"""`python -m gpt.info`: a model's parameters, FLOPs and training memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gpt import GPTConfig, info
from gpt.device import find_gpu
from gpt.step_time import predict
from gpt.weights.checkpoint import load_model


def test_the_command_prints_counts_and_costs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts that differ from the model's, or costs by another formula than the printed one."""
    assert info.main(["gpt2", "--tie_weights", "false", "--qkv-bias", "false"]) == 0
    printed = capsys.readouterr().out
    for part in ("39,383,808", "38,597,376", "786,432", "7,085,568", "1,536", "163,009,536", "621.83"):
        assert part in printed
    assert info.main(["gpt2"]) == 0
    assert "855.2 MFLOP per token" in capsys.readouterr().out
    assert info.main([str(trained)]) == 0
    assert f"{load_model(trained).num_parameters():,}" in capsys.readouterr().out
    for flags, words in (
        ("gtp2", "'gtp2' folder gpt2, char-gpu run"),
        ("nosuch/run", "'nosuch/run' folder gpt2, run"),
        ("", "PRESET|DIR"),
        ("gpt2 more", "'more'"),
    ):
        assert info.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"gpt\.info: .*\n", error)
        assert all(word in error for word in words.split())


def test_the_command_predicts_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prediction printed as if it were measured, without its assumptions, or other figures in its file."""
    path = tmp_path / "prediction.json"
    flags = ["--gpu", "h200", "--batch-size", "64", "--grad_accum", "2", "--json", str(path)]
    assert info.main(["gpt2", *flags]) == 0
    printed = capsys.readouterr().out
    prediction = predict(GPTConfig.preset("gpt2"), find_gpu("H200"), 64, 2)
    total = f"{1e3 * prediction.seconds:,.1f} ms a step, {131072 / prediction.seconds:,.0f} tokens/s"
    for part in (
        "Prediction, not a measurement: a training step of 2 x 64 x 1,024 tokens on one H200",
        f"\npredicted: {total}, {prediction.mfu(prediction.seconds):.1%} MFU\n",
        "Assumptions:",
        "785 TFLOP/s in bfloat16 matmuls, 4.30 TB/s in copies",
        "278 Triton launches",
    ):
        assert part in printed
    assert "--no_capture" not in printed

    written = json.loads(path.read_text("utf-8"))
    assert written == json.loads(json.dumps(prediction.to_dict()))
    assert written["kind"] == "prediction"
    assert sum(part["seconds"] for part in written["components"]) + written["gap_seconds"] == pytest.approx(
        written["gpu_seconds"]
    )
    for part in written["components"]:
        end = re.escape(f"{1e3 * part['seconds']:.2f}  {part['basis']}")
        assert re.search(rf"^{part['name']} .* {end}$", printed, re.M)

    assert info.main(["gpt2", "--gpu", "h200", "--batch_size", "1"]) == 0
    assert "predicted with --no_capture, without a CUDA graph: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "h300"], "--gpu is 'h300', expected one of H100, H100 PCIe, H100 NVL, "),
        (["--batch_size", "4"], "--gpu is not given, expected a GPU with --batch_size"),
        (["--gpu", "a100", "--batch_size", "0"], "batch_size is 0, expected an integer"),
        (["--gpu", "a100", "--json", "{file}/x"], "--json: cannot write "),
    ],
)
def test_a_prediction_from_bad_flags_is_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag that is ignored, or a traceback."""
    file = tmp_path / "file"
    file.touch()
    assert info.main(["gpt2", *(flag.format(file=file) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
