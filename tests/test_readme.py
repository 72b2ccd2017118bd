"""The README: its code runs, its results are what comes out, its flags and names exist, and it stays
short."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt
import gpt.config
import kernels
from kernels import dispatch
from tests.gpt.text import TEXT

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # its 65 characters
COMMANDS = re.findall(r"-m ((?:gpt|bench)[.\w]*)(.*)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's presets at a size that takes no time, on a CPU, in a folder with the text that it
    reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "input.txt").write_text(
        SHAKESPEARE + "".join(c for c in TEXT[:2000] if c in SHAKESPEARE), encoding="utf-8"
    )
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    steps = {"max_steps": 2, "batch_size": 2, "eval_batches": 1}
    monkeypatch.setitem(gpt.config._MODEL_PRESETS, "gpt2", shape)
    monkeypatch.setitem(gpt.config._MODEL_PRESETS, "char-cpu", shape)
    monkeypatch.setitem(gpt.config._TRAIN_PRESETS, "char-cpu", steps)
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 5)
    monkeypatch.setattr(
        dispatch, "interpreting", False
    )  # use_triton=True then takes the references, as on any CPU


def outcomes(code: str) -> Iterator[tuple[ast.stmt, Any]]:
    """The statements of `code`, each with the value that the comment behind it states, or None."""
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        comment = lines[statement.end_lineno - 1][statement.end_col_offset :].strip().removeprefix("# ")
        stated = None
        with contextlib.suppress(SyntaxError, ValueError):
            stated = ast.literal_eval(comment)
        yield statement, stated


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::kernels.FallbackWarning")
def test_its_code_runs() -> None:
    """A line that fails when typed, or a result that is not what the comment behind it says."""
    code = "".join(blocks("python")).replace('"cuda"', '"cpu"')
    ids, heads = torch.randint(100, (2, 16)), torch.randn(1, 2, 8, 16)
    names: dict[str, Any] = {"tokens": ids, "targets": ids, "prompt": ids, "q": heads, "k": heads, "v": heads}
    stated = 0
    for statement, value in outcomes(code):
        source = ast.unparse(statement)
        if value is None:
            exec(source, names)
        else:
            assert eval(source, names) == value, source
            stated += 1
    assert stated >= 6
    assert names["result"].validation_loss > 0
    assert len(names["model"].train_loss) == len(names["model"].validation_loss) > 1
    assert Path("my-model/tokenizer.json").exists()


def flags_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags in a command's help."""
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.delitem(sys.modules, command, raising=False)  # else runpy warns that it is loaded already
    with pytest.raises(SystemExit):
        runpy.run_module(command, run_name="__main__")
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("command", sorted({name for name, _ in COMMANDS if "." in name}))
def test_its_flags_exist(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flag that was renamed and is still recommended."""
    known = flags_of(command, monkeypatch, capsys)
    recommended = {
        flag
        for name, line in COMMANDS
        if name == command
        for flag in re.findall(r"--\w+", line.split("#")[0])
    }
    assert recommended <= known, recommended - known


def test_every_flag_in_its_prose_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same, between the code blocks."""
    known = set.union(
        *(flags_of(f"gpt.{name}", monkeypatch, capsys) for name in ("train", "sample", "eval", "info"))
    )
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"(?<=`)--\w+", prose)) <= known


def test_its_names_exist() -> None:
    """A function, class or module that was renamed and is still recommended."""
    names = set(re.findall(r"\b((?:gpt|kernels)(?:\.[A-Za-z_]\w*)+)", README)) - {"kernels.py"}
    for name in names:
        found: Any = {"gpt": gpt, "kernels": kernels}[name.split(".")[0]]
        place = name.split(".")[0]
        for part in name.split(".")[1:]:
            place += f".{part}"
            with contextlib.suppress(ImportError):
                importlib.import_module(place)
            assert hasattr(found, part), name
            found = getattr(found, part)
    assert len(names) >= 20


def test_it_stays_short() -> None:
    """A README that nobody reads to its end."""
    assert len(README.splitlines()) <= 265
