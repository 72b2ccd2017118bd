"""Damaged exports, files that never end, and odd paths: one line, at once, and never another model."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt import GPT, CharTokenizer
from gpt.errors import InputError, ReportedError
from gpt.weights.archives import MOST_OPERATIONS
from gpt.weights.checkpoint import find_checkpoint, load_checkpoint_tokenizer
from gpt.weights.files import locate
from gpt.weights.pretrained import load_pretrained, load_pretrained_tokenizer
from tests.gpt.weights.layouts import H
from tests.gpt.weights.test_checkpoint import save
from tests.gpt.weights.test_files import nano_file, rezipped, saved, shards

posix = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs, devices and links are POSIX's")
TOKENIZER = CharTokenizer("abcdefghi")
MUTANTS = 24  # of each file


def attempt(load: Callable[[Path], Any], path: Path) -> Any:
    """What `load` returns, or the one line with which it refuses the path."""
    try:
        return load(path)
    except ReportedError as error:
        message = str(error)
    assert "\n" not in message
    return message


def small_model() -> GPT:
    return GPT(vocab_size=9, block_size=4, n_layer=1, n_head=1, n_embd=4, device="cpu")


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """Flipped bytes, truncations, and blocks that read as zeros."""
    rng = random.Random(0)
    for number in range(count):
        mutant, place = bytearray(content), rng.randrange(len(content))
        if number % 3 == 0:
            mutant[place] ^= rng.randrange(1, 256)
        elif number % 3 == 1:
            del mutant[place:]
        else:
            mutant[place : place + 64] = bytes(len(mutant[place : place + 64]))
        yield bytes(mutant)


@pytest.mark.parametrize("format", ["fused-gpt", "huggingface"])
def test_a_damaged_file_never_gives_another_model(format: str, tmp_path: Path) -> None:
    """A damaged export that loads as another model or tokenizer, because its hashes are not read."""
    folder, model = tmp_path / "model", small_model()
    model.save_pretrained(folder, format=format, tokenizer=TOKENIZER)
    expected = dict(model.named_parameters())
    refused = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for mutant in mutations(content, MUTANTS):
            path.write_bytes(mutant)
            if path.name == "tokenizer.json":
                assert isinstance(attempt(load_pretrained_tokenizer, folder), str) or mutant == content
                continue
            loaded = attempt(load_pretrained, folder)
            if isinstance(loaded, str):
                refused += 1
            else:
                assert loaded.config == model.config
                assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
        path.write_bytes(content)
        load_pretrained_tokenizer(folder)
    assert refused >= 2 * MUTANTS


def test_a_changed_export_says_what_to_do(tmp_path: Path) -> None:
    """An export that can no longer be edited, or an edited one that loads without a word."""
    small_model().save_pretrained(tmp_path / "m", format="huggingface", tokenizer=TOKENIZER)
    (tmp_path / "m/README.md").write_text("A file that nothing reads.")
    load_pretrained(tmp_path / "m")
    for name, load in (("config.json", load_pretrained), ("tokenizer.json", load_pretrained_tokenizer)):
        with (tmp_path / "m" / name).open("a") as file:
            file.write(" ")
        words = (
            rf"{name} is not the file that SHA256SUMS .*; if the change is intended, remove .*m/SHA256SUMS"
        )
        with pytest.raises(InputError, match=words):
            load(tmp_path / "m")
    (tmp_path / "m/SHA256SUMS").unlink()
    load_pretrained(tmp_path / "m")
    load_pretrained_tokenizer(tmp_path / "m")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the address of a socket is at most 107 bytes
        patch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.parent.parent / "fifo")
    path.symlink_to(path.parent.parent / "fifo")


ENDLESS: dict[str, Callable[[Path], object]] = {
    "fifo": fifo,
    "link-to-fifo": link_to_fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": unix_socket,
    "itself": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "folder": Path.mkdir,
}


def folders(kind: str, tmp_path: Path) -> Path:
    """A folder of weights of one kind, with all the files that are read."""
    folder = tmp_path / kind
    if kind == "run":
        return save(folder, 1, small_model())
    if kind == "sharded":
        folder.mkdir()
        places = shards(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), "utf-8")
    elif kind == "nanogpt":
        folder.mkdir()
        (folder / "ckpt.pt").write_bytes(nano_file())
    else:
        small_model().save_pretrained(folder, format=kind, tokenizer=TOKENIZER)
    return folder


LOADERS: tuple[Callable[[Path], object], ...] = (
    lambda folder: load_pretrained(folder, {"n_head": H} if folder.name == "sharded" else None),
    load_pretrained_tokenizer,
)


@posix
@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
def test_a_file_that_is_not_regular_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    """A load that waits for a FIFO, reads /dev/zero for ever, or ends in a traceback."""
    for kind in ("run", "fused-gpt", "huggingface", "sharded", "nanogpt"):
        folder = folders(kind, tmp_path)
        for path in sorted(folder.iterdir()):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            (tmp_path / "fifo").unlink(missing_ok=True)
            copy = tmp_path / "copy" / kind
            shutil.copytree(folder, copy)
            (copy / path.name).unlink()
            make(copy / path.name)
            loaders = (find_checkpoint, *LOADERS) if kind in ("run", "fused-gpt") else LOADERS
            answers = [attempt(load, copy) for load in loaders]
            assert (
                any(isinstance(answer, str) for answer in answers) or path.name == "tokenizer_config.json"
            ), path

    make(tmp_path / "copy" / "weights")
    with pytest.raises(InputError, match=r"^(from_pretrained|checkpoint): [^\n]*$"):
        load_pretrained(tmp_path / "copy/weights")


@contextmanager
def denied(name: str) -> Iterator[None]:
    """As if a file or folder had no permissions; root ignores the real ones."""

    def deny(operation: Callable[..., Any], itself: bool) -> Callable[..., Any]:
        def run(path: Any, *args: Any, **options: Any) -> Any:
            *parents, last = (None,) if isinstance(path, int) else Path(os.fsdecode(path)).parts or (None,)
            if name in parents or (itself and last == name):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return operation(path, *args, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for operation in ("open", "listdir", "scandir", "stat", "lstat", "mkdir"):
            patch.setattr(os, operation, deny(getattr(os, operation), "stat" not in operation))
        yield


@posix
@pytest.mark.parametrize(
    "name", ["parent", "model", "model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"]
)
def test_denied_permissions_are_named(name: str, tmp_path: Path) -> None:
    """A traceback, or a claim that the file is missing, for a file that the user may not read."""
    model = small_model()
    for format in ("fused-gpt", "huggingface"):
        folder = tmp_path / "parent" / format / "model"
        model.save_pretrained(folder, format=format, tokenizer=TOKENIZER)
        load = load_pretrained_tokenizer if name == "tokenizer.json" else load_pretrained
        with denied(name), pytest.raises(InputError, match=rf"cannot read .*{name}.*: Permission denied"):
            load(folder)
        if "." not in name:
            with denied(name), pytest.raises(InputError, match=r"cannot .*: Permission denied"):
                model.save_pretrained(folder, format=format)


ODD_PATHS = {
    "long": "x" * 300,
    "long-inside": f"model/{'x' * 300}",
    "nul": "a\0b",
    "no-user": "~nosuchuser/model",
    "bytes": "model\udcff/x",
    "empty": "",
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("text", ODD_PATHS.values(), ids=ODD_PATHS)
def test_an_odd_path_is_refused_in_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback for a path that no file can have."""
    monkeypatch.chdir(tmp_path)
    for load in (load_pretrained, load_pretrained_tokenizer, find_checkpoint, load_checkpoint_tokenizer):
        with pytest.raises(InputError) as raised:
            load(text)
        assert "\n" not in str(raised.value)
    if text not in ("model\udcff/x",):
        with pytest.raises(InputError):
            small_model().save_pretrained(text)


LOCAL = ["runs/x", "./x", "../x", "/nowhere/x", "~/x", "a/b/c", "a\\b", "x/", "x.pt", "a/model.safetensors"]


@pytest.mark.parametrize("name", [*LOCAL, "openai-community/gpt2", "gpt2"])
def test_only_the_name_of_a_model_is_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path that is asked of the hub, or a model of the hub that is taken for a path."""
    asked: list[str] = []
    monkeypatch.setattr("gpt.weights.files._download", asked.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    if name in LOCAL:
        with pytest.raises(InputError, match="does not exist"):
            locate(name)
    else:
        locate(name)
    assert asked == ([] if name in LOCAL else [name])


TUPLE, NONE = b")", b"N"
BOMBS = {
    "deep": b"}" + TUPLE + b"\x85" * 500_000 + b"K\x01s",
    "wide": b"}" + TUPLE + b"q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s",
    "lists": b"]" * 5000 + b"a" * 4999,
    "long": b"N0" * (MOST_OPERATIONS // 2 + 1) + NONE,
    "integer": b"}\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"Ns",
    "underflow": b"00",
}


@pytest.mark.parametrize("pickle", BOMBS.values(), ids=BOMBS)
def test_a_pickle_bomb_is_refused(pickle: bytes, tmp_path: Path) -> None:
    """A pickle that hangs, that overflows the C stack, or whose integer no message can print."""
    (tmp_path / "ckpt.pt").write_bytes(rezipped(saved({}), lambda _: b"\x80\x02" + pickle + b"."))
    with pytest.raises(InputError, match=r"expected tensors alone|is damaged"):
        load_pretrained(tmp_path)


def test_an_unprintable_name_is_refused_in_one_line(tmp_path: Path) -> None:
    """A message of several lines, or one that cannot be printed, for the name of a tensor."""
    for name in ("a\nb", "\ud800", "\x1b[2J"):
        (tmp_path / "ckpt.pt").write_bytes(saved({name: torch.zeros(1)}))
        with pytest.raises(InputError, match="expected a printable name") as raised:
            load_pretrained(tmp_path)
        assert str(raised.value).isprintable()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux resets the peak memory")
def test_loading_takes_twice_the_file(tmp_path: Path) -> None:
    """Copies of the weights while they are hashed, checked and loaded."""
    GPT(vocab_size=9, block_size=4, n_layer=1, n_head=1, n_embd=1400, device="cpu").save_pretrained(
        tmp_path / "m"
    )
    size = (tmp_path / "m/model.safetensors").stat().st_size

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(tmp_path / "m", device="cpu")
    assert size > 90e6
    assert resident("VmHWM") - before < 2 * size + 40e6
