"""Small launches of every kernel with its shipped tile, for `bench.validate`.

The sizes are the smallest at which a launch has several programs, a tail that needs the masks, and
loops longer than the pipeline, so that its prologue, steady state and epilogue all run. Inputs are float16:
Triton's interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from kernels import reference, tuning
from kernels.launch import Launch
from kernels.registry import SPECS
from kernels.spec import Case

Outputs = dict[str, Tensor]
PROGRAMS = 2  # of the kernels whose number of programs is a choice
T = {False: 333, True: 336}  # queries; 336 is a multiple of 16, for which Triton compiles other accesses
WINDOW, PADDING = 150, 40  # with key_start: keys that a query sees; keys of left padding
DROPOUT_P = 0.1
HALF = torch.float16


@dataclass(frozen=True)
class Sample:
    """Launches that run in order on the same tensors.

    `actual` are results that the launches fill; `expected` computes them in plain PyTorch, in a given dtype.
    Only kernels whose name contains `only` are validated; the others run for their results.
    """

    op: str
    label: str
    launches: list[Launch]
    actual: Outputs
    expected: Callable[[torch.dtype], Outputs]
    only: str = ""


class Inputs:
    """Random tensors from a fixed seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def indices(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def samples(op: str, architecture: int) -> Iterator[Sample]:
    """The samples of an op on an architecture; each lives until the next one is made."""
    for label, make in _SAMPLES[op].items():
        yield make(op, label, architecture)


def _leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def _attention(
    d: int, *, start: bool = False, dropout: bool = False, hkv: int | None = None, form: str = ""
) -> Callable[..., Sample]:
    """Causal attention at head dimension `d`.

    form: of backward. "" is the deterministic one, "atomic" takes five matmuls, and "dkdv" is the
    deterministic one where dQ is not needed, so that delta has a kernel of its own. Forward runs first, for
    its results.
    """

    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.attention.backward import attention_backward
        from kernels.attention.forward import attention_forward

        inputs, grouped = Inputs(), hkv is not None
        b, h, t = 1 + start, 1 + grouped, T[start or (dropout and d == 64)]
        q, grad = inputs.normal(b, h, t, d), inputs.normal(b, h, t, d)
        k, v = (inputs.normal(b, hkv or h, t, d) for _ in range(2))
        key_start = None
        if start:
            window = torch.arange(t).sub(WINDOW).clamp(min=0)
            key_start = torch.stack([window, torch.full((t,), PADDING)]).to(torch.int32)
        seed = torch.tensor(7) if dropout else None
        tiles = tuning.attention_tiles(architecture, HALF.itemsize, d, dropout=dropout, grouped=grouped)
        tiles = tiles._replace(atomic=tuning.ATTENTION_ATOMIC[d] if form == "atomic" else None)

        out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
        common: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "key_start": key_start,
            "seed": seed,
            "out": out,
            "lse2": torch.empty(b, h, t),
            "scale": 1 / math.sqrt(d),
            "dropout_p": dropout * DROPOUT_P,
        }
        forward = attention_forward(**common, tile=tiles.forward)
        backward = attention_backward(
            **common, grad=grad, dq=None if form == "dkdv" else dq, dk=dk, dv=dv, tiles=tiles
        )

        def expected(dtype: torch.dtype) -> Outputs:
            leaves = _leaves(dtype, q, k, v)
            options = {"key_start": key_start, "dropout_p": common["dropout_p"], "seed": seed}
            y = reference.causal_attention(*leaves, **options)
            gradients = torch.autograd.grad(y, leaves, grad.to(dtype))
            return {"out": y, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

        actual = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        if form == "dkdv":
            del actual["dq"]
        # Grouped heads have a tile of their own for dK and dV alone.
        return Sample(op, label, [forward, *backward], actual, expected, "dkdv" if grouped else "")

    return make


def _decode(d: int) -> Callable[..., Sample]:
    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.attention.decode import attention_decode

        inputs = Inputs()
        tile = tuning.attention_decode_tile(architecture, HALF.itemsize, d, 1024)
        b, h, tq, keys = 2, 2, 3, PROGRAMS * 4 * tile.block_n - 9  # two parts of four tiles of keys
        q, k, v = (
            inputs.normal(b, h, tq, d),
            inputs.normal(b, 1, keys + 5, d),
            inputs.normal(b, 1, keys + 5, d),
        )
        cache_len = torch.tensor([keys, keys // 3], dtype=torch.int32)
        key_start = torch.tensor([PADDING, 0], dtype=torch.int32)
        out = torch.empty_like(q)
        launch = attention_decode(
            q=q,
            k=k,
            v=v,
            cache_len=cache_len,
            key_start=key_start,
            out=out,
            counter=torch.zeros(b, dtype=torch.int32),
            scale=1 / math.sqrt(d),
            splits=PROGRAMS,
            tile=tile,
        )

        def expected(dtype: torch.dtype) -> Outputs:
            caches = (x.to(dtype) for x in (q, k, v))
            return {"out": reference.decode_attention(*caches, cache_len, key_start=key_start)}

        return Sample(op, label, [launch], {"out": out}, expected)

    return make


def _norm(c: int, *, residual: bool = False, dropout: bool = False) -> Callable[..., Sample]:
    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.norm.backward import layer_norm_backward, layer_norm_backward_sum
        from kernels.norm.forward import layer_norm_forward

        inputs, rows = Inputs(), tuning.norm_tile(c).block_m
        n = 4 * rows + rows // 2 + 1  # a program of backward has at least two blocks of rows
        x, dy, weight, bias = inputs.normal(n, c), inputs.normal(n, c), inputs.normal(c), inputs.normal(c)
        old, dnew = (inputs.normal(n, c, dtype=torch.float32) if residual else None for _ in range(2))
        y, dx, dweight, dbias = (torch.empty_like(z) for z in (x, x, weight, bias))
        new, dresidual = (torch.empty_like(old) if old is not None else None for _ in range(2))
        z = None if new is None else torch.empty_like(y)
        seed, p, stats = torch.tensor(7) if dropout else None, dropout * DROPOUT_P, torch.empty(2, n)
        partials: dict[str, Any] = {
            f"partial_{name}": torch.empty(PROGRAMS, c) for name in ("dweight", "dbias")
        }
        launches = [
            layer_norm_forward(
                x=x,
                residual=old,
                weight=weight,
                bias=bias,
                seed=seed,
                y=y,
                new_residual=new,
                stats=stats,
                z=z,
                eps=1e-5,
                dropout_p=p,
            ),
            layer_norm_backward(
                dy=dy,
                dnew_residual=dnew,
                h=x if z is None else z,
                holds_z=z is not None,
                weight=weight,
                seed=seed,
                stats=stats,
                dx=dx,
                dresidual=dresidual,
                dropout_p=p,
                programs=PROGRAMS,
                tile=tuning.norm_backward_tile(architecture, c, 4 if residual else 2, dropout=dropout),
                **partials,
            ),
            layer_norm_backward_sum(**partials, dweight=dweight, dbias=dbias),
        ]

        def expected(dtype: torch.dtype) -> Outputs:
            leaves = _leaves(dtype, x, weight, bias)
            if old is None or dnew is None:
                outputs = [reference.layer_norm(leaves[0], leaves[1], leaves[2])]
                gradients = torch.autograd.grad(outputs, leaves, [dy.to(dtype)])
                names = ["y", "dx", "dweight", "dbias"]
            else:
                wide = torch.promote_types(dtype, torch.float32)
                leaves.insert(1, old.to(wide).requires_grad_())
                outputs = list(
                    reference.add_layer_norm(
                        leaves[0], leaves[1], leaves[2], leaves[3], dropout_p=p, seed=seed
                    )
                )
                gradients = torch.autograd.grad(outputs, leaves, [dy.to(dtype), dnew.to(wide)])
                names = ["y", "new", "dx", "dresidual", "dweight", "dbias"]
            return dict(zip(names, [*outputs, *gradients], strict=True))

        actual = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        if new is not None and dresidual is not None:
            actual |= {"new": new, "dresidual": dresidual}
        return Sample(op, label, launches, actual, expected)

    return make


def _norm_sum(op: str, label: str, architecture: int) -> Sample:
    """The sum of more partial rows than one tile has, for the bias alone: the kernel without the weight."""
    from kernels.norm.backward import layer_norm_backward_sum

    partial = Inputs().normal(520, 40, dtype=torch.float32)
    dbias = torch.empty(40, dtype=HALF)
    launch = layer_norm_backward_sum(partial_dweight=None, partial_dbias=partial, dweight=None, dbias=dbias)
    return Sample(op, label, [launch], {"dbias": dbias}, lambda dtype: {"dbias": partial.sum(0, dtype=dtype)})


def _dropout(c: int) -> Callable[..., Sample]:
    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.norm.dropout_kernel import dropout_forward

        x = Inputs().normal(2 * tuning.norm_tile(c).block_m + 1, c)
        y, seed = torch.empty_like(x), torch.tensor(7)
        launch = dropout_forward(x=x, seed=seed, y=y, dropout_p=DROPOUT_P)

        def expected(dtype: torch.dtype) -> Outputs:
            return {"y": reference.dropout(x.to(dtype), DROPOUT_P, seed=seed)}

        return Sample(op, label, [launch], {"y": y}, expected)

    return make


def _gelu(*, tanh: bool) -> Callable[..., Sample]:
    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.ffn.gelu import bias_gelu_backward, bias_gelu_forward
        from kernels.norm.backward import layer_norm_backward_sum

        inputs, f = Inputs(), 704 if tanh else 700  # 704 is a multiple of 16
        n = 4 * tuning.gelu_tile(f).block_m + 1
        h, da, bias = inputs.normal(n, f), inputs.normal(n, f), inputs.normal(f)
        a, again, dh, dbias = (torch.empty_like(x) for x in (h, h, h, bias))
        partial = torch.empty(PROGRAMS, f)
        common: dict[str, Any] = {"h": h, "bias": bias, "tanh": tanh}
        launches = [
            bias_gelu_forward(**common, a=a),
            bias_gelu_backward(
                **common,
                da=da,
                dh=dh,
                a=again,
                partial_dbias=partial,
                programs=PROGRAMS,
                tile=tuning.gelu_backward_tile(f, h.element_size()),
            ),
            layer_norm_backward_sum(partial_dweight=None, partial_dbias=partial, dweight=None, dbias=dbias),
        ]

        def expected(dtype: torch.dtype) -> Outputs:
            leaves = _leaves(dtype, h, bias)
            y = torch.nn.functional.gelu(leaves[0] + leaves[1], approximate="tanh" if tanh else "none")
            gradients = torch.autograd.grad(y, leaves, da.to(dtype))
            return {"a": y, "again": y, "dh": gradients[0], "dbias": gradients[1]}

        return Sample(op, label, launches, {"a": a, "again": again, "dh": dh, "dbias": dbias}, expected)

    return make


def _gelu_gemm(op: str, label: str, architecture: int) -> Sample:
    """The matmul with GELU in its epilogue, at the tile of the ahead-of-time builds: no table row has one."""
    from kernels.ffn.builds import GEMM_TILE as tile
    from kernels.ffn.gemm import gelu_gemm_forward

    inputs, m, n, k = Inputs(), tile.block_m + 9, tile.block_n + 9, 64 * (tile.num_stages + 1) + 16
    x, w, bias = inputs.normal(m, k), inputs.normal(n, k) / 8, inputs.normal(n)
    h, a = (torch.empty(m, n, dtype=HALF) for _ in range(2))
    launch = gelu_gemm_forward(x=x, w=w, bias=bias, h=h, a=a, tanh=True, tile=tile)

    def expected(dtype: torch.dtype) -> Outputs:
        y = torch.nn.functional.linear(x.to(dtype), w.to(dtype))
        return {"h": y, "a": torch.nn.functional.gelu(y + bias.to(dtype), approximate="tanh")}

    return Sample(op, label, [launch], {"h": h, "a": a}, expected)


def _loss(v: int, *, gradient: bool = True, options: bool = False) -> Callable[..., Sample]:
    def make(op: str, label: str, architecture: int) -> Sample:
        from kernels.loss.softmax import cross_entropy

        inputs, width, rows = Inputs(), -(-v // 64) * 64, tuning.loss_tile(v, bias=options).block_m
        n, smoothing, z_loss = 2 * rows + 1, 0.1 * options, 1e-2 * options
        buffer = inputs.normal(n, width)
        before = buffer[:, :v].clone()
        targets = inputs.indices(v, n)
        targets[1] = -100
        bias = inputs.normal(width, dtype=torch.float32) if options else None
        grad = inputs.normal(n, dtype=torch.float32) if options else None
        losses = torch.empty(n)
        launch = cross_entropy(
            logits=buffer[:, :v],
            targets=targets,
            bias=bias,
            grad=grad,
            losses=losses,
            ignore_index=-100,
            label_smoothing=smoothing,
            z_loss=z_loss,
            gradient=gradient,
        )

        def expected(dtype: torch.dtype) -> Outputs:
            logits = before.to(dtype).requires_grad_()
            wide = torch.promote_types(dtype, torch.float32)
            total = logits.to(wide) if bias is None else logits.to(wide) + bias[:v].to(wide)
            y = torch.nn.functional.cross_entropy(total, targets, reduction="none", label_smoothing=smoothing)
            y = y + z_loss * torch.logsumexp(total, -1).square() * (targets != -100)
            weights = torch.ones_like(y) if grad is None else grad.to(wide)
            (dlogits,) = torch.autograd.grad(y, logits, weights)
            return {"losses": y, "dlogits": dlogits}

        actual = {"losses": losses} | ({"dlogits": buffer[:, :v]} if gradient else {})
        return Sample(op, label, [launch], actual, expected)

    return make


def _scale(op: str, label: str, architecture: int) -> Sample:
    from kernels.loss.softmax import scale_gradient

    inputs = Inputs()
    gradient, scale = inputs.normal(4, 1040, dtype=torch.float32), torch.tensor(0.37)
    out = torch.empty(4, 1040, dtype=HALF)
    launch = scale_gradient(gradient=gradient, scale=scale, out=out)
    return Sample(op, label, [launch], {"out": out}, lambda dtype: {"out": (gradient * scale).to(dtype)})


def _decoded(sizes: dict[str, int], **options: Any) -> Callable[..., Sample]:
    """A sample of an op of one decoded token, from the inputs of its specification."""

    def make(op: str, label: str, architecture: int) -> Sample:
        spec = SPECS[op]
        inputs = spec.make_inputs(Case(sizes, options), HALF, torch.device("cpu"), Inputs().generator)
        out = spec.reference(**inputs)

        def expected(dtype: torch.dtype) -> Outputs:
            wide = {n: v.to(dtype) if _is_float(v) else v for n, v in inputs.items()}
            y = spec.reference(**wide)
            return {name: wide[name] for name in spec.writes} | {"out": y}

        launches = _DECODE_LAUNCHES[op](inputs, torch.empty_like(out), architecture)
        actual = {name: inputs[name] for name in spec.writes} | {"out": launches[-1].arguments["out_ptr"]}
        return Sample(op, label, launches, actual, expected)

    return make


def _embedding_launches(inputs: dict[str, Any], out: Tensor, architecture: int) -> list[Launch]:
    from kernels.decode.embedding import decode_embedding_forward

    tile = tuning.decode_embedding_tile(architecture, out.shape[1])
    return [decode_embedding_forward(**inputs, out=out, tile=tile)]


def _block_launches(inputs: dict[str, Any], out: Tensor, architecture: int) -> list[Launch]:
    from kernels.decode.block import decode_block_forward

    defaults = {"scale": 1 / math.sqrt(inputs["k_cache"].shape[-1]), "eps": 1e-5, "approximate": "tanh"}
    return decode_block_forward(**{**defaults, **inputs}, out=out, architecture=architecture, splits=PROGRAMS)


def _head_launches(inputs: dict[str, Any], out: Tensor, architecture: int) -> list[Launch]:
    from kernels.decode.linear import decode_linear

    weight = inputs["head_weight"]
    tile = tuning.decode_linear_tile(architecture, HALF.itemsize, *weight.shape, len(out))
    norm = inputs["norm_weight"], inputs["norm_bias"]
    launch = decode_linear(
        x=inputs["x"], weight=weight, bias=inputs["head_bias"], out=out, tile=tile, norm=norm, eps=1e-5
    )
    return [launch]


def _argmax_launches(inputs: dict[str, Any], out: Tensor, architecture: int) -> list[Launch]:
    from kernels.decode.argmax import decode_argmax_forward

    logits = inputs["logits"]
    tile = tuning.decode_argmax_tile(architecture, HALF.itemsize, logits.shape[1])
    return [decode_argmax_forward(logits=logits, out=out, tile=tile)]


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


_DECODE_LAUNCHES = {
    "decode_embedding": _embedding_launches,
    "decode_block": _block_launches,
    "decode_head": _head_launches,
    "decode_argmax": _argmax_launches,
}
_ATTENTION: dict[str, dict[str, Any]] = {
    "": {},
    "-start": {"start": True},
    "-dropout": {"dropout": True},
    "-grouped": {"hkv": 1},
    "-atomic": {"form": "atomic"},
}
_SAMPLES: dict[str, dict[str, Callable[..., Sample]]] = {
    "causal_attention": {
        f"D{d}{name}": _attention(d, **options) for d in (64, 128) for name, options in _ATTENTION.items()
    }
    | {"D64-start-dkdv": _attention(64, start=True, form="dkdv")},
    "causal_attention_qkv": {},  # the kernels of causal_attention
    "decode_attention": {f"D{d}": _decode(d) for d in (64, 128)},
    "decode_embedding": {"C300": _decoded({"B": 3, "C": 300, "V": 17, "P": 9}, key_start="padding")},
    "decode_block": {"C160": _decoded({"B": 3, "C": 160, "H": 2, "Tmax": 300, "D": 64, "I": 300})},
    "decode_head": {"C333": _decoded({"B": 2, "C": 333, "V": 67})},
    "decode_argmax": {"V50257": _decoded({"B": 2, "V": 50257}), "V65": _decoded({"B": 1, "V": 65})},
    "layer_norm": {"C768": _norm(768), "C333": _norm(333), "sum": _norm_sum},
    "add_layer_norm": {
        "C768": _norm(768, residual=True),
        "C768-dropout": _norm(768, residual=True, dropout=True),
        "C333-dropout": _norm(333, residual=True, dropout=True),
    },
    "dropout": {"C768": _dropout(768), "C333": _dropout(333)},
    "gelu_ffn": {"tanh": _gelu(tanh=True), "erf": _gelu(tanh=False), "matmul": _gelu_gemm},
    "linear_cross_entropy": {
        "V65": _loss(65),
        "V65-options": _loss(65, options=True),
        "V33000-loss": _loss(33000, gradient=False),
        "V33000": _loss(33000),
        "V33000-options": _loss(33000, options=True),
        "scale": _scale,
    },
}
