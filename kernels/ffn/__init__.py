"""The feed-forward: `gelu_ffn`."""

from __future__ import annotations

import torch

from kernels import checks
from kernels.dispatch import Choice, Op, autocast
from kernels.ffn import reference
from kernels.tuning import slower

_GELU_FFN = Op("gelu_ffn", family="ffn")


def gelu_ffn(
    x: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor | None,
    w_down: torch.Tensor,
    b_down: torch.Tensor | None,
    *,
    approximate: str = "tanh",
) -> torch.Tensor:
    """y = gelu(x w_upᵀ + b_up) w_downᵀ + b_down.

    Args:
        x: (..., C), any floating-point dtype.
        w_up: (I, C), as `nn.Linear` holds it, in x's dtype.
        b_up: (I,) or None.
        w_down: (Cout, I).
        b_down: (Cout,) or None.
        approximate: "tanh": gelu(h) = h/2 (1 + tanh(sqrt(2/π) (h + 0.044715 h³))); "none": gelu(h) = h/2 (1 +
            erf(h/√2)).

    Returns:
        (..., Cout) in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: A tensor of another dtype, or something that is not a tensor.
        ValueError: Sizes or devices that do not fit; an unknown approximation.
        RuntimeError: ``use_backend("triton")`` cannot be honoured.

    Numerics:
        The matmuls accumulate in float32; bias and GELU are computed in float32. Saved for backward: the
        weights, x and x w_upᵀ; backward recomputes GELU. Results are deterministic.

    Backend:
        The reference runs for float64, and wherever `kernels.explain` says that Triton cannot run.

    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2; Radford et al., GPT-2 (2019).
    """
    choice, x, w_up, b_up, w_down, b_down = _prepare_gelu_ffn(
        x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down, approximate=approximate
    )
    if choice.backend == "triton":
        from kernels.ffn import torch_op

        return torch_op.gelu_ffn(
            x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down, approximate=approximate
        )
    return reference.gelu_ffn(x, w_up, b_up, w_down, b_down, approximate=approximate)


@_GELU_FFN.prepares
def _prepare_gelu_ffn(
    x: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor | None,
    w_down: torch.Tensor,
    b_down: torch.Tensor | None,
    approximate: str,
) -> tuple[Choice, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    op = "gelu_ffn"
    x, w_up, b_up, w_down, b_down = autocast(x, w_up, b_up, w_down, b_down)
    sizes = checks.shapes(
        op,
        ("b_up", "b_down"),
        x=(x, ("...", "C")),
        w_up=(w_up, ("I", "C")),
        b_up=(b_up, ("I",)),
        w_down=(w_down, ("Cout", "I")),
        b_down=(b_down, ("Cout",)),
    )
    checks.same_dtype(op, x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)
    checks.one_of(op, "approximate", approximate, ("tanh", "none"))
    limit = "the kernel takes no empty dimension" if 0 in (*w_up.shape, *w_down.shape) else None
    choice = _GELU_FFN.choose(x, limit=limit, slower=slower(op, x, **sizes))
    return choice, x, w_up, b_up, w_down, b_down
