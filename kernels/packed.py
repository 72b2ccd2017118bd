"""Weights for generation on a CPU, in bfloat16 or int8.

A decoded token multiplies one row with every weight, so it takes the time to read them. For so few rows,
torch's matmuls compute these dtypes slower than memory delivers them. Its `embedding_bag` keeps up: x Wᵀ is
the sum of the rows of Wᵀ, weighted by x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

WIDTHS = (96, 128, 64)  # outputs of a block, the fastest first: their sums fit into the registers of AVX2
FEW = 8  # up to this many rows, a matmul takes the time to read its weight
OFFSET = 128  # int8 -128 is stored as uint8 0
aten = torch.ops.aten


class PackedWeight(Tensor):
    """A matrix W (O, C) on a CPU that is read, never written. It behaves as `dense()` in every operation.

    The outputs are divided into blocks of `width`; the last one is padded with zeros. Row b C + c of the
    table has the column c of block b, so that a matmul with one row reads the table from begin to end.

    Args:
        table: (blocks · C, width) bfloat16, or uint8 with 8 more columns: the float32 factor 1 and summand
            -128 of a row, as `embedding_bag_byte_rowwise_offsets` expects them.
        scale: (O,) float32, the factor of each output of an int8 table, else None.
        shape: (O, C).
    """

    FORMATS = ("bfloat16", "int8")
    # Operations arrive in __torch_dispatch__ alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, table: Tensor, scale: Tensor | None, shape: torch.Size) -> PackedWeight:
        dtype = table.dtype if scale is None else torch.float32
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=table.device)

    def __init__(self, table: Tensor, scale: Tensor | None, shape: torch.Size) -> None:
        self.table, self.scale = table, scale
        self.outputs, self.columns = shape
        self.width = table.shape[1] if scale is None else table.shape[1] - 8
        self.blocks = table.shape[0] // self.columns

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {'bfloat16' if self.scale is None else 'int8'})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub has no `cls`
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is aten.detach.default:
            return cls(args[0].table, args[0].scale, args[0].shape)
        if function is aten.clone.default:
            scale = args[0].scale
            return cls(args[0].table.clone(), None if scale is None else scale.clone(), args[0].shape)
        if function is aten.embedding.default and isinstance(args[0], cls):
            return args[0].rows(args[1])
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                name = function.overloadpacket
                raise RuntimeError(f"PackedWeight: {name} writes to it, expected a weight that is read")
        return function(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))

    def rows(self, index: Tensor) -> Tensor:
        """W[index], (..., C), for int64 or int32 indices of any shape."""
        block, column = index // self.width, index % self.width
        blocks = self.table.view(self.blocks, self.columns, -1)
        if self.scale is None:
            return blocks[block, :, column]
        return (blocks[block, :, column].float() - OFFSET) * self.scale[index][..., None]

    def dense(self) -> Tensor:
        """W, (O, C), in the dtype that this tensor states."""
        blocks = self.table.view(self.blocks, self.columns, -1)[..., : self.width]
        values = blocks.transpose(1, 2).reshape(-1, self.columns)[: self.outputs]
        return values if self.scale is None else (values.float() - OFFSET).mul_(self.scale[:, None])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias for rows x (N, C). Up to FEW rows read the table once; others unpack it.

        bfloat16 is then multiplied in float32: torch's bfloat16 matmul takes six times as long on a CPU that
        has no instructions for it.
        """
        rows = len(x)
        if 0 < rows <= FEW and x.dtype == self.dtype and not torch.is_grad_enabled():
            return self._linear_few(x, rows, bias)
        y = F.linear(x.float(), self.dense().float(), None if bias is None else bias.float())
        return y.to(x.dtype)

    def _linear_few(self, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        index, offsets = _bags(self.blocks, self.columns, rows)
        weights = x.expand(self.blocks, rows, self.columns).reshape(-1)
        if self.scale is None:
            y = torch.embedding_bag(self.table, index, offsets, False, 0, False, weights, False)[0]
        else:
            y = _byte_bag()(self.table, index, offsets, False, 0, False, weights, None, False)

        if rows > 1:
            y = y.view(self.blocks, rows, self.width).transpose(0, 1).reshape(rows, -1)
        elif self.blocks > 1:
            y = y.view(1, -1)
        if y.shape[1] > self.outputs:
            y = y[:, : self.outputs]
        if self.scale is not None:
            return y * self.scale if bias is None else torch.addcmul(bias, y, self.scale)
        return y.contiguous() if bias is None else y + bias


@cache
def _byte_bag() -> Callable[..., Tensor]:
    """The op for int8, which a build of torch may lack."""
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


def pack(weight: Tensor, format: str) -> PackedWeight:
    """`weight` (O, C) as "bfloat16", or as "int8" with one scale for each output, max|w| / 127.

    Raises:
        ValueError: Another format, or a weight that is not a matrix on a CPU.
    """
    if format not in PackedWeight.FORMATS:
        raise ValueError(f"pack: format is {format!r}, expected one of {', '.join(PackedWeight.FORMATS)}")
    if weight.ndim != 2 or weight.device.type != "cpu":
        raise ValueError(
            f"pack: weight has {weight.ndim} dimensions on {weight.device}, expected a matrix on a CPU"
        )
    outputs, columns = weight.shape
    width = min(WIDTHS, key=lambda w: -(-outputs // w) * w)
    blocks = -(-outputs // width)
    if format == "bfloat16":
        table = weight.new_zeros(blocks * width, columns, dtype=torch.bfloat16)
        table[:outputs] = weight
        return PackedWeight(_blocked(table, width), None, weight.shape)

    weight = weight.detach().float()
    scale = weight.abs().amax(1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    values = torch.full((blocks * width, columns), OFFSET, dtype=torch.uint8)
    values[:outputs] = (weight / scale[:, None]).round_().add_(OFFSET).to(torch.uint8)
    affine = torch.tensor([1.0, -OFFSET]).view(torch.uint8).expand(blocks * columns, 8)
    return PackedWeight(torch.cat([_blocked(values, width), affine], 1), scale, weight.shape)


def _blocked(matrix: Tensor, width: int) -> Tensor:
    """(blocks · C, width) from (blocks · width, C)."""
    return matrix.view(-1, width, matrix.shape[1]).transpose(1, 2).reshape(-1, width).contiguous()


def _dense(value: object) -> object:
    return value.dense() if isinstance(value, PackedWeight) else value


@lru_cache(maxsize=64)
def _bags(blocks: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """The table's rows that each bag sums, and the first index of each bag. The rows of x alternate."""
    index = torch.arange(blocks * columns, dtype=torch.int32).view(blocks, 1, columns)
    offsets = torch.arange(0, blocks * rows * columns, columns, dtype=torch.int32)
    return index.expand(blocks, rows, columns).reshape(-1).contiguous(), offsets
