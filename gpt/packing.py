"""Models whose matrices are packed for generation on a CPU, in bfloat16 or int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

import kernels
from gpt.errors import InputError

FORMATS = kernels.PackedWeight.FORMATS
Model = TypeVar("Model", bound=nn.Module)


def pack_weights(model: Model, format: str) -> Model:
    """`model`, a GPT on a CPU, whose matrices are now packed in one of FORMATS.

    Activations are bfloat16, or float32 for int8. The position embedding, of which a step reads one row, is
    not packed.
    """
    model.to(torch.bfloat16 if format == "bfloat16" else torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and name != "wpe":
            module.weight = nn.Parameter(kernels.pack(module.weight.detach(), format), requires_grad=False)
    return model.requires_grad_(False)


def is_packed(model: nn.Module) -> bool:
    """Whether matrices of `model` are packed."""
    return any(isinstance(parameter, kernels.PackedWeight) for parameter in model.parameters())


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raises InputError for a model whose matrices are packed, which cannot be `what`."""
    if is_packed(model):
        raise InputError(
            f"GPT: a model that is quantized for generation is {what}, expected the model without quantize"
        )


def check_conversion(model: nn.Module, convert: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Raises InputError if `convert` would change the device or the dtype of a model that is packed."""
    if is_packed(model):
        converted = convert(torch.empty(0, dtype=dtype, device="cpu"))
        if (converted.device.type, converted.dtype) != ("cpu", dtype):
            refuse_packed(model, "moved or converted")


def check_quantize(quantize: str | None, dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuses a format that is unknown, or that does not fit the parameters' dtype or the device."""
    if quantize is None:
        return
    if quantize not in FORMATS:
        raise InputError(f"from_pretrained: quantize is {quantize!r}, expected {', '.join(FORMATS)} or None")
    activations = torch.bfloat16 if quantize == "bfloat16" else torch.float32
    if dtype not in (None, activations):
        raise InputError(
            f"from_pretrained: dtype is {dtype} with quantize={quantize!r}, expected {activations} or None"
        )
    if device.type != "cpu":
        raise InputError(
            f"from_pretrained: quantize is {quantize!r} on {device}, expected device='cpu', or "
            "dtype='bfloat16' without quantize"
        )


def generation_format(dtype: str, device: torch.device) -> tuple[str | None, str | None]:
    """`dtype` and `quantize` of `GPT.from_pretrained` for --dtype: on a CPU, bfloat16 is packed too.

    Raises:
        InputError: int8 on a GPU, or float16 on a CPU, where its matmuls are many times slower.
    """
    if dtype == "auto":
        return None, None
    if device.type != "cpu":
        if dtype == "int8":
            raise InputError(f"--dtype is int8 on {device}, expected bfloat16 or float16, or --device cpu")
        return dtype, None
    if dtype == "float16":
        raise InputError("--dtype is float16 on a CPU, expected float32, bfloat16 or int8 there")
    return (None, dtype) if dtype in FORMATS else (dtype, None)
