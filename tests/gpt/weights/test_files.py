"""Reading weights: damaged, mislabelled, hostile and remote files give one clear error and run no code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt import GPT, InputError
from gpt.weights.files import _wanted_files
from tests.gpt.weights.layouts import C, H, NanoGPT, T, V

HEADS = {"n_head": H}
HUGE = 1 << 33


def nano_file() -> bytes:
    file = io.BytesIO()
    model = NanoGPT()
    torch.save({"model": model.state_dict(), "model_args": model.arguments}, file)
    return file.getvalue()


def state() -> dict[str, torch.Tensor]:
    """nanoGPT's parameters, without the head, which is tied to the embedding."""
    return {name: tensor for name, tensor in NanoGPT().state_dict().items() if name != "lm_head.weight"}


def safetensors_file(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def rezipped(
    content: bytes, change: Callable[[bytes], bytes] = bytes, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A torch.save file whose pickle `change` has changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return file.getvalue()


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Unknown:
    """An object of a class that is neither a tensor nor a storage."""


def expanded() -> dict[str, torch.Tensor]:
    """Parameters that are all views of one element: copying them would take a terabyte."""
    one = torch.zeros(1)
    wide = 1 << 17
    shapes = {
        "wte.weight": (V, wide),
        "wpe.weight": (T, wide),
        "h.0.attn.c_attn.weight": (3 * wide, wide),
        "h.0.mlp.c_fc.weight": (4 * wide, wide),
    }
    return {name: one.expand(shape) for name, shape in shapes.items()}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged or not a weights file, expected safetensors or a torch.save file"),
    "text": (b"<html>404 Not Found</html>" * 9, "is damaged or not a weights file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is a Git LFS pointer, expected the file",
    ),
    "old-torch": (
        pickle.dumps({"a": 1}, 2),
        "torch.save(torch.load(FILE, weights_only=True), FILE) converts a file",
    ),
    "zip": (rezipped(saved({}), lambda data: b"") + b"", "is damaged"),
    "zip-of-something": (b"PK\x05\x06" + bytes(18), "is a zip of 0 files, expected a torch.save file"),
    "code": (
        saved({"model": Runs(os.system, "touch ran")}),
        "needs posix.system, which may run code, expected tensors alone",
    ),
    "code-2": (
        saved({"model": Runs(eval, "open('ran', 'w')")}),
        "eval, which may run code, expected tensors alone",
    ),
    "object": (
        saved({"model": state(), "trainer": Unknown()}),
        "needs tests.gpt.weights.test_files.Unknown, which may run code",
    ),
    "bytearray": (saved({"model": Runs(bytearray, HUGE)}), "bytearray, which may run code"),
    "bomb": (
        rezipped(saved({"a": torch.zeros(1 << 20)}), compression=zipfile.ZIP_DEFLATED),
        "is compressed or claims more than its",
    ),
    "storage-claim": (
        rezipped(
            saved({"wte.weight": torch.zeros(16)}), lambda p: p.replace(b"K\x10t", b"\x8a\x06\0\0\0\0\0\x01t")
        ),
        "has no known layout",
    ),
    "shape-claim": (
        rezipped(
            saved({"wte.weight": torch.zeros(4, 4)}),
            lambda p: p.replace(b"K\x04K\x04", b"J\0\0\0\x40J\0\0\0\x40"),
        ),
        "is damaged (RuntimeError",
    ),
    "expanded": (saved(expanded()), "bytes of parameters, but has"),
    "protocol-4": (
        rezipped(saved({}), lambda _: pickle.dumps({"model": Runs(os.getcwd)}, 4)),
        "needs STACK_GLOBAL, which may run code",
    ),
    "header-claim": (struct.pack("<Q", HUGE) + b"{" + bytes(80), "is damaged or not a weights file"),
    "header-garbage": (struct.pack("<Q", 40) + b"{" + bytes(80), "cannot read"),
    "tensor-claim": (
        safetensors_file(
            {"wte.weight": {"dtype": "F32", "shape": [HUGE, 9], "data_offsets": [0, HUGE * 36]}}
        ),
        "cannot read",
    ),
    "tensor-overflow": (
        safetensors_file(
            {"wte.weight": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}
        ),
        "cannot read",
    ),
    "tensor-overlap": (
        safetensors_file(
            {
                name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
                for name in ("wte.weight", "wpe.weight")
            },
            bytes(16),
        ),
        "cannot read",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["ckpt.pt", "weights"])
def test_a_hostile_file_is_refused_in_one_line(
    content: bytes, message: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code in a file that runs, memory allocated because a file claims it, or a traceback."""
    resource = pytest.importorskip("resource", reason="only POSIX reports peak memory")
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as raised:
        GPT.from_pretrained(tmp_path / name, HEADS)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # in kB, or bytes on macOS
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_torch_also_refuses_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.load without weights_only=True, the second line of defence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.weights.archives._objection", lambda content: None)
    Path("ckpt.pt").write_bytes(HOSTILE["code"][0])
    with pytest.raises(InputError, match=r"is damaged \(UnpicklingError"):
        GPT.from_pretrained("ckpt.pt")
    assert not Path("ran").exists()


def test_an_error_without_a_message_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception without a message, reported as nothing or as a traceback."""

    def fail(*args: Any, **options: Any) -> None:
        raise EOFError

    (tmp_path / "model.bin").write_bytes(nano_file())
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(InputError, match=r"is damaged \(EOFError: EOFError\)$"):
        GPT.from_pretrained(tmp_path)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    """A mislabelled file that is refused, or unpickled, because of its name."""
    (tmp_path / "model.bin").write_bytes(nano_file())
    assert GPT.from_pretrained(tmp_path / "model.bin").config.n_head == H
    save_file(state(), tmp_path / "model.bin")
    assert GPT.from_pretrained(tmp_path / "model.bin", HEADS).config.n_head == H
    (tmp_path / "model.safetensors").write_bytes(nano_file())
    with pytest.raises(
        InputError, match=r"is a torch\.save file, not safetensors, expected a name that ends in \.pt"
    ):
        GPT.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """A partial download that loads."""
    save_file(state(), tmp_path / "whole.safetensors")
    for content in (nano_file(), (tmp_path / "whole.safetensors").read_bytes()):
        for length in random.Random(0).sample(range(len(content)), 30):
            (tmp_path / "part").write_bytes(content[:length])
            with pytest.raises(InputError):
                GPT.from_pretrained(tmp_path / "part", HEADS)


def test_a_flipped_byte_is_never_a_traceback(tmp_path: Path) -> None:
    """An exception of zipfile, pickle or torch that is not turned into an InputError."""
    draw = random.Random(0)
    content = nano_file()
    for _ in range(150):
        broken = bytearray(content)
        for place in (draw.randrange(len(content)), draw.randrange(3000), -draw.randrange(1, 3000)):
            broken[place] ^= 1 << draw.randrange(8)
        (tmp_path / "broken").write_bytes(broken)
        with suppress(InputError):
            GPT.from_pretrained(tmp_path / "broken", HEADS)


def shards(folder: Path) -> dict[str, str]:
    """Writes nanoGPT's parameters to two files; returns the file of each parameter."""
    tensors = sorted(state().items())
    places = {}
    for number, part in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(part), folder / f"model-{number}.safetensors")
        places |= {name: f"model-{number}.safetensors" for name, _ in part}
    return places


def test_shards_are_merged(tmp_path: Path) -> None:
    """A shard whose parameters are left out."""
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": shards(tmp_path)}), "utf-8"
    )
    model = GPT.from_pretrained(tmp_path, HEADS)
    assert model.config.n_embd == C


INDEXES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "no-map": (lambda places: {}, "has no weight_map"),
    "map-of-lists": (lambda places: {"weight_map": {name: [] for name in places}}, "has no weight_map"),
    "list": (lambda places: [places], "expected a JSON object"),
    "outside": (
        lambda places: {"weight_map": {**places, "a": "../secret"}},
        "lists '../secret', expected a file beside it",
    ),
    "missing-file": (
        lambda places: {"weight_map": {**places, "a": "gone"}},
        "lists 'gone', expected a file beside it",
    ),
    "itself": (
        lambda places: {"weight_map": {"a": "model.safetensors.index.json"}},
        "expected a file beside it",
    ),
    "missing-tensor": (
        lambda places: {"weight_map": {**places, "a": "model-0.safetensors"}},
        "model-0.safetensors lacks a, which",
    ),
}


@pytest.mark.parametrize(("change", "message"), INDEXES.values(), ids=INDEXES)
def test_a_wrong_index_is_refused_in_one_line(
    change: Callable[[dict[str, str]], Any], message: str, tmp_path: Path
) -> None:
    """An index that reads files outside its folder, or that ends in a KeyError."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    places = shards(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(change(places)), "utf-8")
    with pytest.raises(InputError) as raised:
        GPT.from_pretrained(tmp_path / "model", HEADS)
    assert message in str(raised.value)


def test_a_folder_without_one_weights_file_is_refused(tmp_path: Path) -> None:
    """A guess among several files, or an error that does not name the expected files."""
    with pytest.raises(InputError, match="holds no weights, expected a run, a checkpoint, or one file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "a.pth").write_bytes(nano_file())
    assert GPT.from_pretrained(tmp_path).config.n_head == H
    (tmp_path / "b.pt").touch()
    with pytest.raises(InputError, match=r"holds several files of weights \(a.pth, b.pt\), expected a run"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="does not exist, expected a file, a folder or the name of a model on the hub"
    ):
        GPT.from_pretrained(tmp_path / "nowhere")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The hub's client, without a network and with an empty cache."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def unreachable(*args: Any, **settings: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    return huggingface_hub


@pytest.mark.parametrize("network", ["none", "black-hole"])
def test_without_a_network_the_error_names_the_files(
    network: str, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that hangs, or an error that does not say which files are needed."""
    if network == "black-hole":
        monkeypatch.setattr(hub.HfApi, "model_info", lambda *args, **settings: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(InputError) as raised:
        GPT.from_pretrained("openai-community/gpt2")
    assert time.monotonic() - began < 5
    place = "https://huggingface.co/openai-community/gpt2/tree/main"
    assert f"config.json, model.safetensors and tokenizer.json from {place} in a folder, and its path" in str(
        raised.value
    )
    assert ("no answer in 4 s" if network == "black-hole" else "Name or service not known") in str(
        raised.value
    )


def test_a_cached_model_needs_no_network(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A request to the network for a model that is in the cache."""
    (tmp_path / "ckpt.pt").write_bytes(nano_file())
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_files_only: str(tmp_path))
    assert GPT.from_pretrained("someone/nano").config.n_head == H


def test_only_one_format_is_downloaded() -> None:
    """A download of the same weights in several formats."""
    top = ["config.json", "tokenizer.json", "merges.txt"]
    other = ["README.md", "onnx/config.json", "tf_model.h5", "rust_model.ot", "64.tflite", "vocab.json"]
    safe, pickled = ["model.safetensors"], ["pytorch_model.bin"]
    sharded = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]
    assert sorted(_wanted_files(top + other + safe + pickled)) == sorted(top + safe)
    assert sorted(_wanted_files(top + other + sharded)) == sorted(top + sharded)
