"""`python -m gpt.info`: a model's parameters, FLOPs and training memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gpt import GPTConfig, info
from gpt.cluster import Cluster, predict_cluster
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


def test_the_command_predicts_several_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other figures in the file, flags that the prediction ignores, or a rate read in another unit."""
    path = tmp_path / "prediction.json"
    flags = (
        "--gpu h200 --batch_size 8 --grad_accum 128 --world 64 --parallel fsdp --shard_size 4 --per_node 4"
    )
    rates = ["--link", "3200Gb/s", "--node_link", "25GB/s"]
    assert info.main(["gpt2", *flags.split(), *rates, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    cluster = Cluster(64, link=200e9, parallel="fsdp", shard_size=4, per_node=4, node_link=25e9)
    expected = predict_cluster(GPTConfig.preset("gpt2"), find_gpu("h200"), 8, 128, cluster, captured=True)
    assert json.loads(path.read_text("utf-8")) == json.loads(json.dumps(expected.to_dict()))
    for part in (
        "\nPrediction, not a measurement: 64 x H200 with --parallel fsdp in groups of 4,\n",
        "each with 2 x 8 x 1,024 tokens of a step",
        f"\npredicted: {1e3 * expected.seconds:,.1f} ms a step, ",
        f" {64 * 16384 / expected.seconds:,.0f} tokens/s on all GPUs, ",
        f"\nscaling efficiency: {expected.efficiency:.1%} of 64 x ",
        "half of 400 GB/s (3,200 Gb/s)",
        "a GPU sends 25 GB/s (200 Gb/s)",
        "16 machines of 4 GPUs",
    ):
        assert part in printed
    for transfer in expected.transfers:
        sent, across = (f"{transfer.count * size / 1e9:.2f}" for size in (transfer.sent, transfer.across))
        line = rf"^  {transfer.op}, {transfer.name} +{transfer.count} +{transfer.group} +{sent} .* {across}$"
        assert re.search(line, printed, re.MULTILINE)
    for name, size in expected.memory.items():
        assert re.search(rf"^  {name} +{size / 2**20:,.0f}$", printed, re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 110


def test_one_gpu_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """A prediction for one GPU that changes with the flags for several, or needs the rate of its link."""
    assert info.main(["gpt2", "--gpu", "l4"]) == 0
    alone = capsys.readouterr().out
    assert info.main(["gpt2", "--gpu", "l4", "--world", "1", "--parallel", "fsdp"]) == 0
    assert capsys.readouterr().out == alone


def test_the_document_has_the_predicted_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of predictions for several GPUs that the command no longer prints."""
    text = (Path(__file__).parents[2] / "gpt" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(gpt2[^`]* --world [^`]*)` \| (.+) \|$", text, re.MULTILINE)
    assert {flags.split()[2] for flags, _ in rows} == {"8", "512"}
    figures = (
        r"^  total +([\d,]+)$",
        r"^  total +([\d.,]+) +[\d.,]+ +[\d.,]+$",
        r"^  total +[\d.,]+ +[\d.,]+ +([\d.,]+)$",
        r"\((\d+%)\) hide",
        r"([\d.,]+) ms a step, [\d,]+ tokens/s on",
        r"([\d,]+) tokens/s on",
        r"^scaling efficiency: ([\d.]+%)",
    )
    for flags, cells in rows:
        assert info.main([*flags.split(), "--gpu", "h200"]) == 0
        printed = capsys.readouterr().out
        matches = [re.search(figure, printed, re.MULTILINE) for figure in figures]
        assert cells.split(" | ") == [match and match[1] for match in matches], flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "h300"], "--gpu is 'h300', expected one of H100, H100 PCIe, H100 NVL, "),
        (["--batch_size", "4"], "--gpu is not given, expected a GPU with --batch_size"),
        (["--gpu", "a100", "--batch_size", "0"], "batch_size is 0, expected an integer"),
        (["--gpu", "a100", "--json", "{file}/x"], "--json: cannot write "),
        (["--world", "8"], "--gpu is not given, expected a GPU with --world"),
        (["--gpu", "h200", "--world", "0"], "--world is 0, expected an integer in [1, "),
        (["--gpu", "h200", "--world", "8", "--shard_size", "4"], "--shard_size is given with --parallel ddp"),
        (
            ["--gpu", "h200", "--world", "8", "--parallel", "fsdp", "--shard_size", "3"],
            "--shard_size is 3, expected a divisor of --world (8)",
        ),
        (
            ["--gpu", "h200", "--world", "8", "--parallel", "fsdp", "--shard_size", "16"],
            "--shard_size is 16, expected an integer in [1, 8]",
        ),
        (
            ["--gpu", "h200", "--world", "48", "--parallel", "fsdp", "--shard_size", "12"],
            "--shard_size is 12, expected a divisor or a multiple of --per_node (8)",
        ),
        (["--gpu", "h200", "--world", "12"], "--per_node is 8, expected a divisor of --world (12)"),
        (
            ["--gpu", "h200", "--world", "8", "--grad_accum", "12"],
            "--grad_accum is 12, expected a multiple of --world (8)",
        ),
        (
            ["--gpu", "h200", "--world", "8", "--link", "900"],
            "--link is '900', expected bytes or bits per second",
        ),
        (["--gpu", "l4", "--world", "8"], "--link is not given, expected the bandwidth between L4 GPUs"),
        (
            ["--gpu", "h200", "--node_link", "fast"],
            "--node_link is 'fast', expected bytes or bits per second",
        ),
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
