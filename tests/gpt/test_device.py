"""The device: which one is picked, its dtype for autocast, its memory and the peak of a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from gpt import GPTConfig, InputError, TrainConfig
from gpt.device import GPU, GPUS, autocast_dtype, check_memory, find_gpu, peak_flops, pick_device


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
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peak_flops_belongs_to_the_gpu(name: str, peak: float | None) -> None:
    """An MFU against the peak of another GPU with a similar name."""
    assert peak_flops(name) == peak


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gpu_has_its_own_row(gpu: GPU) -> None:
    """A row of the table that a shorter name before it hides, or a name that must be typed exactly."""
    assert peak_flops(f"NVIDIA {gpu.name}") == gpu.flops
    for name in (gpu.name, gpu.name.lower(), gpu.name.replace(" ", "-"), gpu.name.replace(" ", "")):
        assert find_gpu(name) is gpu


def test_an_unknown_gpu_is_refused() -> None:
    """A prediction for another GPU whose name is similar; a message without the known names."""
    for name in ("H20", "NVIDIA H200", ""):
        with pytest.raises(InputError, match=f"^--gpu is '{name}', expected one of H100 PCIe, .*, RTX 3090$"):
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
    with pytest.raises(InputError, match=f"^device is {re.escape(repr(name))}, expected ") as caught:
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
    """A model that exhausts the machine's memory instead of being refused at once."""
    cpu = torch.device("cpu")
    check_memory(GPTConfig.preset("char-cpu"), TrainConfig(), cpu)
    with pytest.raises(InputError, match=r"takes about 13\.9 TiB, expected at most the [\d.]+ .iB free"):
        check_memory(GPTConfig(n_embd=48 * 1024, n_layer=30), TrainConfig(), cpu)
