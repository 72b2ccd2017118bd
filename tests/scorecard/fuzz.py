"""Rows that feed hostile input to every reader: it gives a result, or refuses in one line."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

import kernels.files
from gpt import GPT, GPTConfig, TokenData, eval, info, sample, train
from gpt.cli import field_types
from gpt.config import TrainConfig
from gpt.data.dataset import DataConfig
from gpt.data.text_stream import Stopped, TextStream
from gpt.data.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer
from gpt.errors import ReportedError
from gpt.files import read_json
from gpt.training.run_folder import LOG, RunFolder
from gpt.weights import checkpoint
from gpt.weights.files import read_weights
from gpt.weights.huggingface import save_huggingface
from gpt.weights.pretrained import load_pretrained
from tests.gpt.text import TEXT
from tests.scorecard import hostile
from tests.scorecard.mutators import json_value
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Refused, Say, answer, random_of, run_trials, variables

Target = Callable[[Random, Say], None]  # makes one attack
TABLES: dict[str, Any] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}
FLAGS: dict[ModuleType, tuple[Any, ...]] = {
    train: (train.RunConfig, DataConfig, GPTConfig, TrainConfig),
    sample: (sample.SampleConfig,),
    eval: (eval.EvalConfig,),
    info: (info.StepOptions, GPTConfig),
}
PRICES = (0, 2, 4, 5)  # the exit codes that input may cause


class Ended(ReportedError):
    """Ends a command after its settings, before its work."""

    exit_code = 0


def _fuzz(name: str, prepare: Callable[[Path], Target], trials: int, seed: int, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)  # relative paths in an attack stay inside
    try:
        with (
            variables(HF_HUB_OFFLINE="1", FUSED_GPT_CACHE=str(folder / "cache")),
            pytest.MonkeyPatch.context(),
        ):
            target = prepare(folder)
            return run_trials(trials, lambda number, say: target(random_of(name, seed, number), say))
    finally:
        os.chdir(before)


@contextmanager
def _ended(*places: tuple[Any, str]) -> Iterator[None]:
    """Makes the functions at these places end the command."""

    def end(*_: Any, **__: Any) -> Any:
        raise Ended("ended")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, end)
        yield


def _command(module: ModuleType, argv: list[str]) -> None:
    """Runs a command up to its work.

    Raises:
        AssertionError: It ends in an exception, with another exit code, or with other than one line.
    """
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    places = ((TokenData, "load"), (sample, "from_checkpoint"), (eval, "from_checkpoint"))
    try:
        with _ended(*places), redirect_stdout(out), redirect_stderr(err):
            code = module.main(argv)
    except SystemExit as error:  # --help
        code = error.code or 0
    except Exception as error:
        try:
            answer(partial(_raise, error))
        except AssertionError as wrong:
            raise AssertionError(f"{wrong} after {argv!r}") from error
    assert code in PRICES, f"exit code {code} after {argv!r}"
    lines = [line for line in err.getvalue().splitlines() if ": warning: " not in line]
    assert len(lines) <= 1, f"{lines[:3]} after {argv!r}"
    assert lines or code == 0, f"exit code {code} without a message after {argv!r}"


def _raise(error: Exception) -> None:
    raise error


def _tempting(folder: Path) -> None:
    """What the relative names of hostile.PATHS point at."""
    os.mkfifo(folder / "fifo")
    (folder / "self").symlink_to("self")
    (folder / "folder").mkdir()
    (folder / "file").write_bytes(b"\xff\0{")


def _toml(folder: Path) -> Target:
    tables = {name: list(field_types(cls)) for name, cls in TABLES.items()}
    path = folder / "fuzz.toml"

    def attack(rng: Random, say: Say) -> None:
        content = hostile.toml(rng, tables)
        say(repr(content[:120]))
        path.write_bytes(content)
        _command(train, ["--config", str(path)])

    return attack


def _flags(folder: Path) -> Target:
    _tempting(folder)
    flags = {module: [n for cls in classes for n in field_types(cls)] for module, classes in FLAGS.items()}

    def attack(rng: Random, say: Say) -> None:
        module = rng.choice(list(flags))
        argv = hostile.arguments(rng, dict.fromkeys(flags[module]))
        argv += ["gpt2"] if module is info and rng.random() < 0.9 else []
        say(f"{module.__name__} {argv!r}")
        _command(module, argv)

    return attack


def _texts(folder: Path) -> Target:
    tokenizers = (BPETokenizer.train(TEXT, 300), CharTokenizer.train(TEXT + "\u3042\u0301\0\r"))

    def attack(rng: Random, say: Say) -> None:
        tokenizer, text = rng.choice(tokenizers), hostile.text(rng)
        special = rng.random() < 0.3
        say(f"{type(tokenizer).__name__} special={special} {text[:80]!r}")
        ids = answer(lambda: tokenizer.encode(text, special=special))
        if isinstance(ids, Refused):
            ours = isinstance(tokenizer, CharTokenizer) or not _is_text(text)
            assert ours, f"a byte-level tokenizer refuses a text: {ids}"
            return
        assert all(0 <= i < tokenizer.vocab_size for i in ids), f"ids {ids[:8]}"
        if _is_text(text):
            assert tokenizer.decode(ids) == text, "the text comes back as another one"
            assert tokenizer.decode_bytes(ids) == text.encode(), "its bytes come back as others"
        else:
            answer(lambda: (tokenizer.decode(ids), tokenizer.decode_bytes(ids)))
        wrong = rng.choice((-1, tokenizer.vocab_size, 2**63, -(2**70), 0))
        answer(lambda: tokenizer.decode([*ids, wrong]))

    return attack


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _tokenizers(folder: Path) -> Target:
    contents = []
    for tokenizer in (BPETokenizer.train(TEXT[:500], 264), CharTokenizer.train(TEXT)):
        tokenizer.save(folder)
        contents.append((folder / "tokenizer.json").read_bytes())
    path = folder / "fuzz.json"

    def attack(rng: Random, say: Say) -> None:
        chance = rng.random()
        if chance < 0.7:
            content = json_value(rng.choice(contents), rng)
        elif chance < 0.85:
            content = hostile.json_bytes(rng, ("model", "added_tokens", "pre_tokenizer", "version"))
        else:
            lines = ["#version: 0.2", *(hostile.text(rng, 8) for _ in range(rng.randint(0, 5)))]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        say(repr(content[-100:]))
        path.write_bytes(content)
        tokenizer = answer(lambda: load_tokenizer(path))
        if isinstance(tokenizer, Refused):
            return
        ids = answer(lambda: tokenizer.encode("the cat\n"))
        if not isinstance(ids, Refused):
            assert tokenizer.decode(ids) == "the cat\n", "the text comes back as another one"
        answer(tokenizer.to_json)

    return attack


def _safetensors(folder: Path) -> Target:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4), device="cpu")
    save_huggingface(model, folder / "export")
    valid = (folder / "export" / checkpoint.MODEL).read_bytes()
    path = folder / checkpoint.MODEL

    def attack(rng: Random, say: Say) -> None:
        content = hostile.safetensors(rng, valid)
        say(repr(content[:120]))
        path.write_bytes(content)
        weights = answer(lambda: read_weights(path))
        if not isinstance(weights, Refused):
            claimed = sum(t.nbytes for t in weights.tensors.values())
            assert claimed <= len(content), f"{claimed} bytes of tensors in a file of {len(content)}"
            answer(lambda: load_pretrained(path, {"n_head": 1}, device="cpu"))

    return attack


def _bins(folder: Path) -> Target:
    CharTokenizer.train(TEXT).save(folder)
    tokenizer = (folder / "tokenizer.json").read_bytes()

    def attack(rng: Random, say: Say) -> None:
        (folder / "tokenizer.json").write_bytes(tokenizer)
        for name in ("train.bin", "val.bin"):
            size = rng.choice((0, 1, 2, 3, 18, 40, 200, 201))
            valid = bytes(rng.choice((0, 1, 2, 28)) if i % 2 == 0 else 0 for i in range(size))
            (folder / name).write_bytes(valid if rng.random() < 0.7 else rng.randbytes(size))
        if rng.random() < 0.1:
            (folder / rng.choice(("tokenizer.json", "val.bin", "train.bin"))).unlink()
        source = rng.choice((str(folder), str(folder), str(folder / "train.bin")))
        config = DataConfig(data=(source,), pack_documents=rng.random() < 0.1)
        say(f"{source} {config.pack_documents} {sorted(p.name for p in folder.glob('*.*'))}")
        data = answer(lambda: TokenData.load(config))
        if isinstance(data, Refused) or isinstance(answer(lambda: data.check(8)), Refused):
            return
        for step in range(2):
            answer(lambda step=step: data.batch("train", 2, 8, seed=rng.randrange(2**63), step=step))
        answer(data.bigram_loss)

    return attack


def _jsonl(folder: Path) -> Target:
    row = json.dumps({"text": "the cat\n", "prompt": "a", "completion": "b"}).encode()
    path = folder / "fuzz.jsonl"

    def attack(rng: Random, say: Say) -> None:
        lines = [row] * rng.randint(0, 2)
        for _ in range(rng.randint(1, 3)):
            keys = ("text", "prompt", "completion", "messages")
            line = hostile.json_bytes(rng, keys) if rng.random() < 0.6 else json_value(row, rng)
            lines.insert(rng.randint(0, len(lines)), line)
        content = b"\n".join(lines)
        say(repr(content[:120]))
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that rows are empty
            data = answer(lambda: TokenData.load(DataConfig(data=(str(path),))))
        if not isinstance(data, Refused) and not isinstance(answer(lambda: data.check(1)), Refused):
            answer(lambda: data.batch("train", 2, 1, seed=1, step=rng.randrange(2**63)))

    return attack


def _pickles(folder: Path) -> Target:
    canary = folder / "canary"
    path = folder / "fuzz.pt"

    def attack(rng: Random, say: Say) -> None:
        content = hostile.torch_file(rng, str(canary))
        # The pickle alone: the headers of a zip have the time, and checksums of a content with the folder.
        pickled = content[max(content.find(b"data.pkl"), 0) :].partition(b"PK\x01\x02")[0]
        say(repr(pickled[:120]))
        path.write_bytes(content)
        weights = answer(lambda: read_weights(path))
        ran = canary.exists()
        canary.unlink(missing_ok=True)
        assert not ran, "runs code"
        if not isinstance(weights, Refused):
            answer(lambda: load_pretrained(path, {"n_head": 1}, device="cpu"))

    return attack


def _json(folder: Path) -> Target:
    path = folder / "fuzz.json"
    fields = [
        *field_types(GPTConfig),
        "n_positions",
        "emb_dim",
        "activation_function",
        "model_type",
        "n_heads",
    ]

    def attack(rng: Random, say: Say) -> None:
        content = hostile.json_bytes(rng, fields)
        say(repr(content[:120]))
        path.write_bytes(content)
        value = answer(lambda: read_json(path))
        if not isinstance(value, Refused):
            answer(lambda: GPTConfig.from_dict(value))
        with suppress(OSError, ValueError):  # what the reader of the caches raises
            kernels.files.read_json(path)

    return attack


def _logs(folder: Path) -> Target:
    record = json.dumps({"step": 1, "train_loss": 2.5, "gradient_norms": {"wte": 0.5}})
    log = folder / "run" / LOG
    log.parent.mkdir()

    def attack(rng: Random, say: Say) -> None:
        lines = [record.encode()] * rng.randint(0, 2)
        for _ in range(rng.randint(1, 3)):
            keys = ("step", "final", "train_loss", "step")
            line = hostile.json_bytes(rng, keys) if rng.random() < 0.6 else json_value(record.encode(), rng)
            lines.insert(rng.randint(0, len(lines)), line)
        content = b"\n".join(lines) + rng.choice((b"\n", b"", b"\n\n", b"{"))
        say(repr(content[:120]))
        log.write_bytes(content)
        if isinstance(
            answer(lambda: RunFolder(log.parent).prepare(5, keep_final=rng.random() < 0.5)), Refused
        ):
            return
        for line in log.read_bytes().decode("utf-8").splitlines():
            kept = json.loads(line)
            assert isinstance(kept, dict), f"keeps the line {line[:80]!r}"
            assert kept["step"] <= 5, f"keeps the line {line[:80]!r}"

    return attack


def _sums(folder: Path) -> Target:
    place = folder / "checkpoint"
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4), device="cpu")
    checkpoint.save_model(model, place, CharTokenizer("abc"))
    valid = (place / checkpoint.SUMS).read_text()

    def attack(rng: Random, say: Say) -> None:
        lines = valid.splitlines()
        action = rng.randrange(6)
        chosen = rng.randrange(len(lines))
        digest, name = lines[chosen].split("  ")
        bad = rng.choice(("../" + name, "/etc/passwd", hostile.text(rng, 8), name + " ", "", name.upper()))
        if action == 0:
            lines[chosen] = f"{digest}  {bad}"
        elif action == 1:
            lines[chosen] = f"{rng.choice((digest[:-1], digest.upper(), 'g' * 64, '0' * 64))}  {name}"
        elif action == 2:
            lines.insert(chosen, rng.choice(("", lines[chosen], hostile.text(rng, 20), f"{digest} *{name}")))
        elif action == 3:
            del lines[chosen]
        elif action == 4:
            rng.shuffle(lines)
        else:
            lines.append(f"{digest}  {bad}")
        content = ("\n".join(lines) + rng.choice(("\n", "", "\n\n", "\r\n"))).encode("utf-8", "surrogatepass")
        say(repr(content[:120]))
        (place / checkpoint.SUMS).write_bytes(content)
        refusal = answer(lambda: checkpoint.verify(place))
        listed = sorted(content.decode("utf-8", "replace").split("\n"))
        assert isinstance(refusal, Refused) or listed == sorted(valid.split("\n")), "accepts other sums"

    return attack


def _streams(folder: Path) -> Target:
    tokenizers = (BPETokenizer.train(TEXT, 300), CharTokenizer.train(TEXT + "\u3042\0\n"))

    def attack(rng: Random, say: Say) -> None:
        tokenizer = rng.choice(tokenizers)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 20))]
        full = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
        stops = []
        for _ in range(rng.randint(0, 3)):
            begin = rng.randrange(len(full) + 1)
            stops.append(
                full[begin : begin + rng.randint(1, 4)] if rng.random() < 0.6 else hostile.text(rng, 4)
            )
        stops = [stop for stop in stops if stop]
        say(f"{type(tokenizer).__name__} {ids} {stops!r}")
        written: list[str] = []
        stream = TextStream(tokenizer, written.append, stops)
        stopped = False
        try:
            for i in ids:
                stream.token(torch.tensor([i]))
            stream.end()
        except Stopped:
            stopped = True
        actual = "".join(written)
        expected = _expected(tokenizer, ids, stops)
        assert actual == (full if expected is None else expected), f"writes {actual!r}, expected {expected!r}"
        assert stopped == (expected is not None), f"stopped is {stopped}"

    return attack


def _expected(tokenizer: Any, ids: list[int], stops: list[str]) -> str | None:
    """The text before the stop text that is complete first; None if there is none."""
    decode = tokenizer.decode_bytes
    whole = decode(ids).decode("utf-8", "replace")
    for count in range(1, len(ids) + 2):
        # The end of the bytes may be half a character, which is decided by the next token, or by the end.
        shown = whole if count > len(ids) else _whole_characters(decode(ids[:count]))
        places = [place for stop in stops if (place := shown.find(stop)) >= 0]
        if places:
            return shown[: min(places)]
    return None


def _whole_characters(content: bytes) -> str:
    import codecs

    return codecs.getincrementaldecoder("utf-8")("replace").decode(content)


def _row(
    name: str, promise: str, prepare: Callable[[Path], Target], small: int, trials: int, long: int
) -> Row:
    return Row(f"fuzz-{name}", promise, partial(_fuzz, name, prepare), trials=trials, small=small, long=long)


ROWS: tuple[Row, ...] = (
    _row("toml", "a --config file gives settings or one line", _toml, 40, 500, 6000),
    _row("flags", "every command's flags give settings or one line", _flags, 60, 600, 8000),
    _row("texts", "a tokenizer gives any text back, or refuses it", _texts, 200, 3000, 25_000),
    _row(
        "tokenizers", "a hostile tokenizer.json is refused, or gives text back", _tokenizers, 60, 1000, 15_000
    ),
    _row("safetensors", "a hostile header is refused and allocates nothing", _safetensors, 100, 1500, 15_000),
    _row("bins", "hostile .bin files are refused, or give batches", _bins, 50, 500, 6000),
    _row("jsonl", "hostile rows of a .jsonl file are refused, or give batches", _jsonl, 50, 500, 6000),
    _row(
        "pickles",
        "a hostile pickle is refused, runs no code and allocates nothing",
        _pickles,
        100,
        1000,
        12_000,
    ),
    _row("json", "hostile JSON gives a config, or is refused", _json, 200, 3000, 20_000),
    _row("logs", "a damaged log.jsonl never blocks a resume with a traceback", _logs, 100, 1500, 12_000),
    _row("sums", "another SHA256SUMS is refused", _sums, 60, 800, 8000),
    _row("streams", "a stream writes the text before the first stop text", _streams, 100, 1500, 15_000),
)
