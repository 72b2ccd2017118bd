"""The device: which one is picked, its dtype for autocast, its memory and the peak of a GPU."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from gpt import GPT, GPTConfig, InputError, TrainConfig
from gpt.device import GPU, GPUS, autocast, autocast_dtype, check_memory, find_gpu, peak_flops, pick_device
from gpt.memory import Free


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peak_flops_belongs_to_the_gpu(name: str, peak: float | None) -> None:
    """An MFU against the peak of another GPU with a similar name."""
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == peak
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gpu_has_its_own_row(gpu: GPU) -> None:
    """A row of the table that a shorter name before it hides, or a name that must be typed exactly."""
    assert peak_flops(f"NVIDIA {gpu.name}", torch.bfloat16) == gpu.flops
    for name in (gpu.name, gpu.name.lower(), gpu.name.replace(" ", "-"), gpu.name.replace(" ", "")):
        assert find_gpu(name) is gpu


def test_an_unknown_gpu_is_refused() -> None:
    """A prediction for another GPU whose name is similar; a message without the known names."""
    for name in ("H20", "NVIDIA H200", ""):
        with pytest.raises(InputError, match=f"^--gpu is '{name}', expected one of H100, .*, RTX 3090, .*$"):
            find_gpu(name)


def test_pick_device_prefers_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU of a machine that has a GPU, or on a GPU that is not there."""
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device(None) == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


DEVICES = (
    "gpu",
    "cuda:99",
    "cuda:-1",
    "meta",
    "xla",
    "hpu",
    "privateuseone",
    "",
    " ",
    "cpu\0",
    "\udcff",
    "c" * 5000,
)


@pytest.mark.parametrize("name", DEVICES, ids=lambda name: ascii(name)[:20])
def test_pick_device_refuses_a_missing_device(name: str) -> None:
    """An unknown device that fails inside torch, after the data has been prepared, or one without values."""
    with pytest.raises(
        InputError, match=f"^device is {re.escape(repr(name))}, (but.*, )?expected "
    ) as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
    assert "mkldnn, opengl" not in str(caught.value)  # kinds that torch can be compiled for


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)]
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that emulates bfloat16, which is slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert autocast_dtype("auto", torch.device("cpu")) == dtype


def test_check_memory_refuses_a_model_that_cannot_fit() -> None:
    """A model that exhausts the machine's memory instead of being refused at once, or no way around."""
    cpu, huge = torch.device("cpu"), GPTConfig(n_embd=48 * 1024, n_layer=30)
    check_memory(GPTConfig.preset("char-cpu"), TrainConfig(), cpu)
    with pytest.raises(
        InputError, match=r"takes about [\d.]+ TiB, expected at most the .* --check_memory false"
    ):
        check_memory(huge, TrainConfig(), cpu)
    check_memory(huge, TrainConfig(check_memory=False), cpu)


@pytest.mark.parametrize(
    ("preset", "gpu", "fits"),
    [("gpt2", 24, True), ("gpt2-medium", 24, True), ("gpt2-xl", 79, True), ("gpt2-xl", 40, False)],
)
def test_a_preset_fits_a_gpu_in_its_precision(
    preset: str, gpu: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset that is refused on a GPU that holds it: float32 values, or logits that are never held."""
    monkeypatch.setattr("gpt.device._free_memory", lambda device, root: Free(gpu * 2**30, "free on cuda"))
    model, train = GPTConfig.preset(preset), TrainConfig.preset(preset, dtype="bfloat16")
    with nullcontext() if fits else pytest.raises(InputError, match="--checkpoint_activations takes less"):
        check_memory(model, train, torch.device("cuda"))
    check_memory(model, replace(train, checkpoint_activations=True), torch.device("cuda"))


def test_check_memory_counts_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is refused although its shards fit, or accepted by the size of a smaller shard."""
    monkeypatch.setattr("gpt.device._free_memory", lambda device, root: Free(40 * 2**30, "free on cuda"))
    model, train = GPTConfig.preset("gpt2-xl"), TrainConfig(batch_size=12, dtype="bfloat16")
    check_memory(model, train, torch.device("cuda"), shards=8)
    larger = replace(train, batch_size=22)
    for shards in (1, 8):
        words = f"batch_size 22{' in 8 shards' if shards == 8 else ''} takes about"
        with pytest.raises(InputError, match=words):
            check_memory(model, larger, torch.device("cuda"), shards=shards)
    assert model.training_bytes(22, 2, shards=8) > 40 * 2**30 > model.training_bytes(12, 2, shards=8)


def saved_bytes(backend: str, dtype: torch.dtype, n_layer: int, *, checkpoint: bool) -> int:
    """The bytes that a forward pass keeps for backward, without what holds parameters or copies of them."""
    torch.manual_seed(0)
    model = GPT(vocab_size=40, block_size=16, n_layer=n_layer, n_head=2, n_embd=32, bias=False, device="cpu")
    model.checkpoint_activations = checkpoint
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.shape not in shapes:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.zeros(3, 16, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with kernels.use_backend(backend), autocast(dtype, torch.device("cpu")), hooks:
        loss = model(ids, ids)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(
    ("backend", "dtype", "checkpoint"),
    [
        ("reference", torch.float32, False),
        ("reference", torch.bfloat16, False),
        ("triton", torch.float32, False),
        ("triton", torch.bfloat16, False),
        ("reference", torch.float32, True),
    ],
)
def test_training_bytes_counts_what_a_block_keeps(backend: str, dtype: torch.dtype, checkpoint: bool) -> None:
    """A formula that leaves out a tensor that a block keeps, or counts one that it does not keep."""
    config = GPTConfig(vocab_size=40, block_size=16, n_layer=1, n_head=2, n_embd=32, bias=False)

    def stated(n_layer: int) -> int:
        shape = replace(config, n_layer=n_layer)
        options = {"fused": backend == "triton", "checkpoint_activations": checkpoint}
        return shape.training_bytes(3, dtype.itemsize, **options) - shape.training_bytes(0, dtype.itemsize)

    actual = [saved_bytes(backend, dtype, n_layer, checkpoint=checkpoint) for n_layer in (1, 2)]
    assert actual[1] - actual[0] == stated(2) - stated(1)
