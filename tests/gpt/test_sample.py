"""`python -m gpt.sample`: continuations, stop texts, streaming, and wrong input."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import GPT, CharTokenizer, GPTConfig, sample
from gpt.data.instructions import NEXT_TURN
from gpt.weights.checkpoint import save_model
from tests.gpt.data.loading import BINS

ROOT = Path(__file__).parents[2]


def run_sample(capsys: pytest.CaptureFixture[str], trained: Path, *flags: str) -> str:
    code = sample.main(["--checkpoint", str(trained), "--device", "cpu", *flags])
    printed, error = capsys.readouterr()
    assert (code, error) == (0, "")
    return printed


def test_every_flag_affects_the_sample(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt that is not continued, or a seed, length or setting without effect."""
    flags = ("--prompt", "the cat", "--max_new_tokens", "30")
    first = run_sample(capsys, trained, *flags)
    assert first.startswith("the cat")
    assert len(first) == len("the cat") + 30 + 1
    assert run_sample(capsys, trained, *flags, "--seed", "1337") == first
    others = [
        ("--seed", "1"),
        ("--temperature", "3"),
        ("--top_k", "1"),
        ("--top_p", "0.1"),
        ("--min_p", "0.9"),
    ]
    for other in (*others, ("--repetition_penalty", "5")):
        assert run_sample(capsys, trained, *flags, *other) != first, other
    greedy = run_sample(capsys, trained, *flags, "--greedy")
    assert greedy == run_sample(capsys, trained, *flags, "--greedy", "--seed", "9", "--temperature", "9")
    (tmp_path / "prompt.txt").write_text("the cat")
    assert run_sample(capsys, trained, "--prompt_file", str(tmp_path / "prompt.txt"), *flags[2:]) == first
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert run_sample(capsys, trained, "--prompt", "-", *flags[2:]) == first
    newest = max((trained / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    assert run_sample(capsys, newest, *flags) == first


@pytest.mark.skipif(sys.platform == "win32", reason="the shell is POSIX's")
def test_a_closed_pipe_ends_the_command(trained: Path) -> None:
    """A traceback in `gpt.sample … | head`."""
    command = (
        f"{sys.executable} -m gpt.sample --checkpoint "
        f"{trained} --prompt the --num_samples 9 --device cpu | head -n 1"
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_several_samples_differ(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sample several times."""
    printed = run_sample(capsys, trained, "--num_samples", "3", "--prompt", "a dog", "--max_new_tokens", "20")
    parts = re.split(r"\n*--- \d ---\n", printed)[1:]
    assert len({part.strip() for part in parts}) == 3
    assert all(part.startswith("a dog") for part in parts)


def test_a_stop_text_ends_the_sample(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stop text that is printed, or that has no effect."""
    flags = ("--prompt", "the cat", "--max_new_tokens", "200", "--seed", "3")
    whole = run_sample(capsys, trained, *flags)
    stop = whole[60:63]
    stopped = run_sample(capsys, trained, *flags, "--stop", stop, "no such text")
    assert stopped == whole[: whole.index(stop, len("the cat"))] + "\n"


def test_the_end_of_the_text_ends_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """<|endoftext|> in the printed text, and another document after it."""
    end = BINS.special_tokens["<|endoftext|>"]
    model = GPT(
        GPTConfig(
            vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8, tie_weights=False, head_bias=True
        ),
        device="cpu",
    )
    with torch.no_grad():
        model.lm_head.bias[end] = 100
    save_model(model, tmp_path / "m", BINS)
    assert run_sample(capsys, tmp_path / "m", "--prompt", "the cat") == "the cat\n"


def test_each_token_is_printed_at_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that is printed only when it is complete."""
    events: list[str] = []
    decode = CharTokenizer.decode_bytes

    def noting(self: CharTokenizer, ids: Any) -> bytes:
        events.append("token")
        return decode(self, ids)

    monkeypatch.setattr(CharTokenizer, "decode_bytes", noting)
    monkeypatch.setattr(
        "builtins.print", lambda *args, **kwargs: events.append(f"print {kwargs.get('flush')}")
    )
    assert (
        sample.main(
            ["--checkpoint", str(trained), "--prompt", "the", "--max_new_tokens", "3", "--device", "cpu"]
        )
        == 0
    )
    assert events[:7] == ["print True", *["token", "print True"] * 3]


def test_ids_past_the_vocabulary_are_never_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids that the tokenizer does not know, from a vocabulary padded for speed (bug 26)."""
    model = GPT(GPTConfig(vocab_size=40, block_size=8, n_layer=1, n_head=1, n_embd=8, head_bias=True)).eval()
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[3:] = 50
    save_model(model, tmp_path / "m", CharTokenizer("abc"))
    for flags in (
        ["--greedy"],
        ["--temperature", "9"],
        ["--repetition_penalty", "2", "--top_p", "1", "--top_k", "9"],
    ):
        printed = run_sample(capsys, tmp_path / "m", "--prompt", "ab", "--max_new_tokens", "30", *flags)
        assert set(printed) <= set("abc\n")
    idx = torch.zeros(4, 1, dtype=torch.long)
    assert int(model.generate(idx, 20, temperature=50.0, vocab_size=3).max()) <= 2
    assert int(model.generate(idx, 20, temperature=50.0).max()) > 2


def type_lines(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_each_line_is_continued(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line without a continuation, another one than of --prompt, or an unknown character that ends all."""
    flags = ("--greedy", "--max_new_tokens", "8")
    prompts = ["the cat", "a dog", "it rained"]
    expected = [run_sample(capsys, trained, "--prompt", p, *flags).removeprefix(p) for p in prompts]

    type_lines(monkeypatch, b"\na dog\r\nthe#cat\nit rained")
    flags = ("--checkpoint", str(trained), "--prompt", "the cat", "--device", "cpu", *flags)
    assert sample.main([*flags, "--interactive"]) == 0
    printed, error = capsys.readouterr()
    assert printed == "".join(expected)
    assert re.fullmatch(r"gpt\.sample: warning: .*'#'.* at position 3 .*\n", error)


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Prompts that a model in tmp_path / "chat" has seen, and the answers to give, one after the other."""
    tokenizer = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=120, n_layer=1, n_head=1, n_embd=8)
    save_model(model, tmp_path / "chat", tokenizer)
    prompts, answers = list[str](), list[str]()

    def generate(model: GPT, idx: torch.Tensor, max_new_tokens: int, **settings: Any) -> None:
        prompts.append(tokenizer.decode(idx[0].tolist()))
        for i in tokenizer.encode(answers.pop(0)):
            if tokenizer.decode([i]) == "~":
                raise KeyboardInterrupt
            settings["on_token"](torch.tensor([i]))

    monkeypatch.setattr(GPT, "generate", generate)
    return prompts, answers


def test_a_conversation_is_kept(
    chat: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Turns that are forgotten, an answer past its end, or a conversation that outgrows the context."""
    prompts, answers = chat
    answers += [f"One.{NEXT_TURN}more", "Two.<|endoftext|>more", "Three."]
    type_lines(monkeypatch, b"How many?\nAnd now?\nNow?")
    flags = ("--chat", "--interactive", "--system", "Count.", "--max_new_tokens", "9")
    assert run_sample(capsys, tmp_path / "chat", *flags) == "One.\nTwo.\nThree.\n"

    system = "### System:\nCount.\n\n### User:\n"
    first, second, third = (f"{text}\n\n### Assistant:\n" for text in ("How many?", "And now?", "Now?"))
    assert prompts == [
        system + first,
        f"{system}{first}One.\n\n### User:\n{second}",
        f"{system}{second}Two.\n\n### User:\n{third}",
    ]
    assert max(map(len, prompts)) <= 120 - 9
    answers.append("Four.")
    assert run_sample(capsys, tmp_path / "chat", "--chat", "--prompt", "And?") == "Four.\n"


def test_ctrl_c_ends_an_answer_and_then_the_command(
    chat: tuple[list[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C that loses the conversation, or that has no effect at the prompt or with a pipe."""
    prompts, answers = chat
    answers += ["On~e.", "Two."]
    lines = iter(["How many?", "", "And now?"])

    def interrupted(prompt: str) -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    flags = ["--checkpoint", str(tmp_path / "chat"), "--chat", "--interactive", "--max_new_tokens", "9"]
    assert sample.main(flags) == 130
    assert capsys.readouterr() == ("On\nTwo.\n\n", "gpt.sample: stopped by Ctrl-C\n")
    assert f"On{NEXT_TURN}And now?" in prompts[1]

    answers += ["On~e.", "Two."]
    type_lines(monkeypatch, b"How many?\nAnd now?")
    assert sample.main(flags) == 130
    assert answers == ["Two."]


WRONG_SAMPLES = {
    "none": ("", "--checkpoint not given"),
    "missing": ("--checkpoint nowhere", "nowhere no folder"),
    "prompts": ("--checkpoint RUN --prompt a --prompt_file b", "--prompt --prompt_file both"),
    "unseen": ("--checkpoint RUN --prompt the#cat", "'#' position 3"),
    "file": ("--checkpoint RUN --prompt_file nowhere.txt", "nowhere.txt"),
    "temperature": ("--checkpoint RUN --temperature 0", "--temperature 0.0 --greedy"),
    "interactive prompt": ("--checkpoint RUN --interactive --prompt -", "--interactive --prompt"),
    "interactive samples": ("--checkpoint RUN --interactive --num_samples 2", "--interactive --num_samples"),
    "chat": ("--checkpoint RUN --chat", "--chat --prompt --interactive"),
    "system": ("--checkpoint RUN --system a", "--system --chat"),
    "chat top_k": ("--checkpoint RUN --prompt a --interactive --top_k 0", "top_k 0"),
    "top_k": ("--checkpoint RUN --top_k 0", "top_k 0"),
    "top_p": ("--checkpoint RUN --top_p 1.5", "top_p 1.5"),
    "samples": ("--checkpoint RUN --num_samples 0", "--num_samples 0"),
    "tokens": ("--checkpoint RUN --max_new_tokens=-1", "max_new_tokens -1"),
    "flag": ("--checkpoint RUN --topk 3", "--topk --top_k"),
    "seed": ("--checkpoint RUN --seed=-1", "--seed -1"),
    "large seed": (f"--checkpoint RUN --seed={2**63}", "--seed expected"),
    "hot": ("--checkpoint RUN --temperature 1e308", "temperature 1e+308"),
    "cold": ("--checkpoint RUN --temperature 1e-320", "temperature 1e-320"),
    "nan": ("--checkpoint RUN --top_p nan", "--top_p 'nan'"),
    "prompt bytes": ("--checkpoint RUN --prompt a\udcff", "--prompt UTF-8 character 1"),
    "stop bytes": ("--checkpoint RUN --stop a \udcff", "--stop UTF-8 character 0"),
    "NUL": ("--checkpoint RUN --prompt a\0", "position 1"),
}


@pytest.mark.parametrize("flag", ["--prompt", "--interactive"])
@pytest.mark.parametrize("stdin", [None, b"\xff", b"x" * 11, OSError])
def test_a_wrong_stdin_is_refused(
    stdin: Any, flag: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback where stdin is closed, is not text, has no end or fails."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(21, "Is a directory")

        readline = read

    content = Failing() if stdin is OSError else io.BytesIO(stdin)
    monkeypatch.setattr("sys.stdin", None if stdin is None else io.TextIOWrapper(content))
    monkeypatch.setattr(sample, "PROMPT_LIMIT", 10)
    assert (
        sample.main(["--checkpoint", str(trained), "--device", "cpu", flag, *["-"][: flag == "--prompt"]])
        == 2
    )
    assert re.fullmatch(rf"gpt\.sample: {flag}: stdin .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("case", WRONG_SAMPLES)
def test_wrong_input_is_refused(case: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or a message without the wrong value."""
    flags, words = WRONG_SAMPLES[case]
    assert sample.main([str(trained) if flag == "RUN" else flag for flag in flags.split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"gpt\.sample: .*\n", error)
    for word in words.split():
        assert word in error
