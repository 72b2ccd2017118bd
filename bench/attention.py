"""`python -m bench.attention`: causal attention and decoding, against other implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.command import command
from bench.contestants import DETERMINISTIC, Contestant, Unsupported, foreign, only, optional, ours
from bench.engine import Bench
from kernels.spec import Case, OpSpec

PINNED = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FLASH_ATTN = {  # name -> module
    "flash-attn": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
CAUSAL_ARGUMENTS = ("q", "k", "v", "scale", "deterministic")
DECODE_ARGUMENTS = ("q", "k_cache", "v_cache", "cache_len", "scale")


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, **_: Any
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention; its causal mask is aligned to the upper left corner."""
    if q.shape[2] != k.shape[2]:
        raise Unsupported("has no causal mask for Tq < Tk")
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _pin(backend: SDPBackend) -> Callable[[], AbstractContextManager[object]]:
    return lambda: sdpa_kernel(backend)


@contextmanager
def _pinned_deterministic(backend: SDPBackend) -> Iterator[None]:
    """Pins `backend` and sets torch's flag for deterministic algorithms, under which it may refuse to run."""
    settings: Any = torch.utils.deterministic
    flag, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # the flag's fills would be timed
    try:
        with sdpa_kernel(backend):
            yield
    finally:
        torch.use_deterministic_algorithms(flag)
        settings.fill_uninitialized_memory = fill


def flex_attention() -> Callable[..., Any]:
    """FlexAttention under torch.compile, with a causal block mask made once for each shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = cache(lambda: torch.compile(flex_attention, dynamic=False))
    masks: dict[tuple[int, int], Any] = {}

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, **_: Any
    ) -> Any:
        tq, tk = q.shape[2], k.shape[2]
        if (tq, tk) not in masks:

            def causal(b: Any, h: Any, row: Any, column: Any) -> Any:
                return column <= row + (tk - tq)

            masks[tq, tk] = create_block_mask(causal, None, None, tq, tk, device=q.device.type)
        return compiled()(q, k, v, block_mask=masks[tq, tk], scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _transposed(
    function: Callable[..., Any], scale_name: str, q: Any, k: Any, v: Any, scale: Any = None, **_: Any
) -> Any:
    """Calls a function that takes and returns (B, T, H, D), perhaps with more outputs."""
    result = function(*(t.transpose(1, 2) for t in (q, k, v)), **{scale_name: scale})
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


def _unpacked(function: Callable[..., Any], qkv: Any, **options: Any) -> Any:
    """Calls a function of q, k and v on the parts of qkv, and returns (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return function(q=q, k=k, v=v, **options).transpose(1, 2)


def _causal(spec: OpSpec, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of q, k and v as a contestant's: of the op's own inputs, without the options it lacks."""
    limited = only(function, CAUSAL_ARGUMENTS)
    return partial(_unpacked, limited) if spec.name == "causal_attention_qkv" else limited


def flash_attn(module: str, **options: Any) -> Callable[..., Any]:
    function = partial(foreign(module, "flash_attn_func"), causal=True, **options)
    return partial(_transposed, function, "softmax_scale")


def xformers() -> Callable[..., Any]:
    mask = foreign("xformers.ops.fmha.attn_bias", "LowerTriangularFromBottomRightMask")()
    return partial(
        _transposed, partial(foreign("xformers.ops", "memory_efficient_attention"), attn_bias=mask), "scale"
    )


def flash_attn_decode() -> Callable[..., Any]:
    function = foreign("flash_attn", "flash_attn_with_kvcache")

    def attend(q: Any, k_cache: Any, v_cache: Any, cache_len: Any, scale: Any = None) -> Any:
        tensors = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return function(*tensors, cache_seqlens=cache_len, softmax_scale=scale, causal=True).transpose(1, 2)

    return attend


def peers(spec: OpSpec, compiled: bool) -> list[Contestant]:
    if spec.name == "decode_attention":
        return [optional("flash-attn", lambda: only(flash_attn_decode(), DECODE_ARGUMENTS))]
    contestants = [Contestant(name, _causal(spec, sdpa), _pin(backend)) for name, backend in PINNED.items()]
    if compiled:
        contestants.append(optional("FlexAttention", lambda: _causal(spec, flex_attention())))
    else:
        contestants.append(Contestant("FlexAttention", None, absent="left out by --quick on a CPU"))
    for name, module in FLASH_ATTN.items():
        contestants.append(optional(name, lambda module=module: _causal(spec, flash_attn(module))))
    contestants.append(optional("xformers", lambda: _causal(spec, xformers())))
    return [*contestants, *deterministic_forms(spec)]


def deterministic_forms(spec: OpSpec) -> list[Contestant]:
    """The contestants whose backward pass has a deterministic form, in that form."""
    contestants = [ours(spec, deterministic=True)]
    for name in ("SDPA flash", "SDPA cudnn"):
        context = partial(_pinned_deterministic, PINNED[name])
        contestants.append(Contestant(name + DETERMINISTIC, _causal(spec, sdpa), context))
    for name, module in FLASH_ATTN.items():

        def build(module: str = module) -> Callable[..., Any]:
            return _causal(spec, flash_attn(module, deterministic=True))

        contestants.append(optional(name + DETERMINISTIC, build))
    return contestants


def matmul(spec: OpSpec, case: Case) -> tuple[int, int, int] | None:
    """A square matmul, large enough to occupy the whole device; decoding is limited by bytes alone."""
    if spec.name == "decode_attention":
        return None
    queries = case["B"] * case["H"] * case["T" if spec.name == "causal_attention_qkv" else "Tq"]
    side = 8192 if queries >= 2**17 else 1024
    return side, side, side


BENCH = Bench("attention", peers, matmul)

if __name__ == "__main__":
    sys.exit(command(BENCH))
