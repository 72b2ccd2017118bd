"""`python -m gpt.train`: a run from text to sample, and wrong input."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt import GPT, GPTConfig, TrainConfig, Trainer, files, train
from gpt.data.dataset import TokenData
from gpt.weights.checkpoint import load_model
from gpt.weights.hashes import write_sums
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import TINY

ROOT = Path(__file__).parents[2]


def test_train_prints_its_results_and_the_next_command(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result that is not printed, or a next command that does not work when typed."""
    out = tmp_path / "my run"
    assert train.main([*TINY, "--max_steps", "4", "--data", text, "--out", str(out)]) == 0
    printed, shown = capsys.readouterr()
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert (
        f"validation loss {last['validation_loss']:.4f}, bigram baseline {last['bigram_loss']:.4f}" in printed
    )
    for part in (
        f"checkpoint: {out / 'checkpoints/step-4'}",
        f"loss curve: {out / 'loss.png'}",
        (out / "sample.txt").read_text().strip(),
    ):
        assert part in printed
    assert f"model: {load_model(out).num_parameters() / 1e6:.2f} M parameters" in printed
    for part in ("4/4", "loss ", "tokens/s", "step/s"):
        assert part in shown
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", shown)  # time taken and left
    following = printed.splitlines()[-1].removeprefix("next: ")
    assert re.search(r"-m gpt\.sample --checkpoint '.*my run'$", following)
    done = subprocess.run(
        f"{following} --max_new_tokens 5", shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(done.stdout) > 5


def settings(out: Path) -> dict[str, Any]:
    newest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    state = json.loads((newest / "state.json").read_text())
    return json.loads((newest / "config.json").read_text()) | state["train"] | state["data"]


def test_flags_win_over_the_file_and_the_file_over_the_preset(text: str, tmp_path: Path) -> None:
    """A setting of the user's that the run ignores."""
    config = tmp_path / "c.toml"
    config.write_text(
        f'[model]\nn_layer = 2\nn_embd = 8\n[train]\nmax_steps = 2\nseed = 5\n[data]\ndata = ["{text}"]\n'
    )
    assert train.main([*TINY, "--config", str(config), "--out", str(tmp_path / "run")]) == 0
    taken = settings(tmp_path / "run")
    assert [taken[name] for name in ("n_layer", "n_embd", "max_steps", "seed", "data")] == [
        1,
        16,
        2,
        5,
        [text],
    ]
    preset = GPTConfig.preset("char-cpu")
    assert (taken["bias"], taken["tie_weights"]) == (preset.bias, preset.tie_weights)
    assert [taken[name] for name in ("optimizer", "learning_rate")] == [
        "muon",
        TrainConfig.preset("char-cpu").learning_rate,
    ]
    assert taken["vocab_size"] == len(set(TEXT))


def test_a_gpt2_preset_uses_the_gpt2_tokenizer(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """GPT-2 that is trained on characters because no flag names a tokenizer."""

    def refuse(url: str) -> bytes:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "_fetch", refuse)
    flags = [*TINY, "--max_steps", "1", "--data", text, "--out", str(tmp_path / "run")]
    assert train.main(["--preset", "gpt2", *flags]) == 2
    assert re.fullmatch(r"gpt\.train: gpt2 tokenizer: cannot download .*\n", capsys.readouterr().err)


def test_an_incomplete_torchrun_environment_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Several processes that each train the whole run in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([*TINY, "--data", text, "--out", str(tmp_path / "run")]) == 2
    assert (
        capsys.readouterr().err
        == "gpt.train: WORLD_SIZE is 2 without RANK, expected both, as torchrun sets them\n"
    )
    assert not (tmp_path / "run").exists()


def test_resume_uses_the_settings_of_the_run(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run that falls back to the preset."""
    out = str(tmp_path / "run")
    assert train.main([*TINY, "--max_steps", "3", "--seed", "8", "--data", text, "--out", out]) == 0
    assert train.main(["--resume", "--out", out, "--max_steps", "5"]) == 0
    taken = settings(tmp_path / "run")
    assert [taken[name] for name in ("n_embd", "max_steps", "seed", "data", "batch_size")] == [
        16,
        5,
        8,
        [text],
        4,
    ]
    capsys.readouterr()
    assert train.main(["--resume", "--out", out, "--n_embd", "32"]) == 2
    assert "n_embd is 32, expected 16" in capsys.readouterr().err
    Path(text).write_text(TEXT + "the end")
    assert train.main(["--resume", "--out", out, "--max_steps", "9"]) == 2
    assert "the text or the tokenizer is not the one" in capsys.readouterr().err


def test_resume_finds_its_data_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative --data that is lost in another folder, or an error that does not say where it was sought."""
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("gpt.training.run_folder.plot_log", lambda *_: None)
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    for folder in (first, second):
        folder.mkdir()
    (first / "text.txt").write_text(TEXT)
    monkeypatch.chdir(first)
    assert train.main([*TINY, "--max_steps", "1", "--data", "*.txt", "text.txt", "--out", str(out)]) == 0

    resume = ["--out", str(out), "--resume"]
    monkeypatch.chdir(second)
    assert train.main([*resume, "--max_steps", "2"]) == 0
    assert settings(out)["data"] == [f"{first}/*.txt", f"{first}/text.txt"]
    (first / "text.txt").rename(second / "text.txt")
    capsys.readouterr()
    assert train.main([*resume, "--max_steps", "3"]) == 2
    error = capsys.readouterr().err
    assert f"data: data is {first}/*.txt, which does not exist in {second}, expected --data PATH" in error
    assert train.main([*resume, "--max_steps", "3", "--data", "*.txt", "text.txt"]) == 0
    assert settings(out)["data"] == ["*.txt", "text.txt"]  # as it was typed, for a folder that is moved

    monkeypatch.chdir(first)
    (second / "text.txt").rename(first / "text.txt")
    assert train.main([*resume, "--max_steps", "4"]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (first / "text.txt").unlink()
    assert train.main([*resume, "--max_steps", "5"]) == 2
    assert f"does not exist in {first} or in {tmp_path}, expected" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that cannot be resumed because settings were added, or that does not take their defaults."""
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("gpt.training.run_folder.plot_log", lambda *_: None)
    out = tmp_path / "run"
    assert train.main([*TINY, "--max_steps", "1", "--data", text, "--out", str(out)]) == 0
    file = out / "checkpoints/step-1/state.json"
    state = json.loads(file.read_text())
    for added in ("keep_best", "time_limit", "final_eval_batches"):
        del state["train"][added]
    del state["working_folder"], state["best_step"]
    file.write_text(json.dumps(state))
    write_sums(file.parent)
    assert train.main(["--out", str(out), "--resume", "--max_steps", "2"]) == 0
    assert settings(out)["final_eval_batches"] == 1000


@pytest.mark.parametrize("reason", ["max_steps", "patience"])
def test_a_finished_run_says_so(
    reason: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A resume without steps that looks as if it had trained, or that does not say what would."""
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
    monkeypatch.setattr("gpt.training.run_folder.plot_log", lambda *_: None)
    monkeypatch.setattr(Trainer, "estimate", lambda self, split: 2.0)
    flags = ["--max_steps", "3"] if reason == "max_steps" else ["--patience", "2", "--eval_interval", "1"]
    out = tmp_path / "run"
    assert train.main([*TINY, *flags, "--data", text, "--out", str(out)]) == 0
    assert "already finished" not in capsys.readouterr().out
    lower = ["--max_steps", "1"] if reason == "max_steps" else []
    assert train.main(["--out", str(out), "--resume", *lower]) == 0
    why = {
        "max_steps": "max_steps is 1 (a larger --max_steps goes on)",
        "patience": "validation loss has not improved for 2 evaluations; best 2.0000 at step 1 (a larger "
        "--patience goes on)",
    }
    line = f"already finished at step 3: {why[reason]}; only the final evaluation is repeated\n"
    assert line in capsys.readouterr().out


def test_init_starts_from_a_trained_model(
    trained: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start from other weights, another tokenizer, or the preset's shape or learning rate."""
    Path(text).write_text(TEXT.replace("U", "u").replace("T", "t"))  # fewer characters than the model knows
    out = tmp_path / "run"
    flags = [
        "--init",
        str(trained),
        "--data",
        text,
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--max_steps",
        "1",
    ]
    assert (
        train.main(
            [*flags, "--block_size", "8", "--dropout", "0.1", "--out", str(out), "--warmup_steps", "100"]
        )
        == 0
    )
    taken, before = settings(out), load_model(trained)
    assert [taken[name] for name in ("n_layer", "n_embd", "block_size", "dropout")] == [1, 16, 8, 0.1]
    assert [taken["vocab_size"], taken["learning_rate"]] == [before.config.vocab_size, 3e-5]
    after = dict(load_model(out).named_parameters())
    for name, p in before.named_parameters():
        assert (p[: len(after[name])] - after[name]).abs().max() < 1e-6, name
    loss = json.loads((out / "log.jsonl").read_text().splitlines()[0])["train_loss"]
    assert loss < 3.0 < math.log(before.config.vocab_size)
    assert train.main(["--resume", "--out", str(out), "--max_steps", "2"]) == 0
    capsys.readouterr()
    Path(text).write_text(TEXT + "!")
    for wrong, words in (
        ([], "'!' position"),
        (["--n_layer", "2"], "n_layer is 2, expected 1"),
        (["--block_size", "32"], "32 16"),
    ):
        assert train.main([*flags, *wrong, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words.split())
    assert not (tmp_path / "no").exists()


def test_runs_are_numbered(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run that is refused, or that overwrites the first."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main([*TINY, "--max_steps", "1", "--data", text]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]


WRONG = {
    "flag": ("--n_layers 3", "--n_layers --n_layer"),
    "vocab_size": ("--vocab_size 3", "--vocab_size unknown"),
    "type": ("--n_layer two", "--n_layer 'two' int"),
    "heads": ("--n_embd 10 --n_head 3", "n_embd 10 n_head"),
    "zero": ("--block_size 0", "block_size 0"),
    "negative": ("--batch_size=-1", "batch_size -1"),
    "absurd width": ("--n_embd 4000000 --n_head 4", "parameters expected"),
    "absurd batch": ("--batch_size 2000000000", "GiB expected"),
    "rate": ("--learning_rate 0", "learning_rate 0"),
    "huge rate": ("--learning_rate 1e39", "learning_rate 1e+39 1e+15"),
    "infinite rate": ("--learning_rate inf", "--learning_rate inf"),
    "beta": ("--beta1 1.0", "beta1 1.0"),
    "dtype": ("--dtype float16", "float16 CPU"),
    "device": ("--device tpu9", "tpu9"),
    "preset": ("--preset gtp2", "'gtp2' 'gpt2'"),
    "corpus": ("--block_size 1000", "600 1001"),
    "missing": ("--data nowhere.txt", "nowhere.txt exist"),
    "tokenizer": ("--tokenizer nowhere", "nowhere char"),
    "config": ("--config nowhere.toml", "nowhere.toml such file"),
    "resume": ("--resume", "--out"),
    "resume nothing": ("--resume --out nowhere", "nowhere no folder"),
    "use_triton": ("--use_triton maybe", "'maybe' auto|true|false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused(
    case: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A traceback, a vague message, a wrong exit code, or files that a failed run leaves."""
    flags, words = WRONG[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*TINY, "--max_steps", "1", "--data", text, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt.train: ")
    assert error.count("\n") == 1
    for word in words.split():
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Training on a file that is not text."""
    monkeypatch.chdir(tmp_path)
    for content, word in ((b"", "empty"), (b"ab\0c", "binary"), (b"ab\xff", "byte 2")):
        Path("text.txt").write_bytes(content)
        assert train.main([*TINY, "--data", "text.txt"]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"gpt\.train: data: text\.txt .*{word}.*\n", error)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_non_finite_loss_exits_with_4(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A diverged run that continues, or whose exit code reports success."""
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * float("nan"))
    out = tmp_path / "run"
    assert train.main([*TINY, "--max_steps", "3", "--data", text, "--out", str(out)]) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpt.train")]
    assert len(lines) == 1
    assert "step 1: the loss is nan" in lines[0]
    assert (out / "non-finite-step-1.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_of_signals(
    number: int, code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run whose exit code reports success."""
    batch, sent = TokenData.batch, []

    def interrupting(self: TokenData, stream: Any, *args: Any, **kwargs: Any) -> Any:
        if stream == "train" and kwargs["step"] == 1 and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return batch(self, stream, *args, **kwargs)

    monkeypatch.setattr(TokenData, "batch", interrupting)
    assert train.main([*TINY, "--max_steps", "9", "--data", text, "--out", str(tmp_path / "run")]) == code
    assert (tmp_path / "run/checkpoints/step-2").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_saves_a_checkpoint(text: str, tmp_path: Path) -> None:
    """A run that is stopped without a checkpoint to resume from."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "gpt.train",
        *TINY,
        "--max_steps",
        "1000000",
        "--data",
        text,
        "--out",
        str(out),
    ]
    command += ["--eval_interval", "10"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "eval" not in (line := process.stdout.readline()) and "step" not in line:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    step = int(re.search(r"stopped at step (\d+), saved in ", printed)[1])
    assert load_model(out / f"checkpoints/step-{step}").config.n_embd == 16
    assert printed.splitlines()[-1].endswith(f"gpt.train --out {out} --resume")


def test_help_is_light() -> None:
    """A --help that needs a GPU, a network or a minute."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--n_layer int" in done.stdout
    assert not done.stderr
