"""`kernels.pack`: the values of packed weights, and their matmuls against `torch.nn.functional.linear`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.linear import FEW

FORMATS = kernels.PackedWeight.FORMATS
each_format = pytest.mark.parametrize("format", FORMATS)
SHAPES = ((1, 1), (64, 3), (65, 16), (96, 48), (200, 40), (257, 33))


def matrix(outputs: int, columns: int) -> Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(outputs))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_has_one_scale_for_each_output(shape: tuple[int, int]) -> None:
    """A scale of the whole matrix, values that wrap around, or rounding towards zero."""
    weight = matrix(*shape) * torch.logspace(-6, 6, shape[0])[:, None]
    weight[-1] = 0
    largest = weight.abs().amax(1, keepdim=True)
    error = (kernels.pack(weight, "int8").dense() - weight).abs()
    assert (error <= largest / 127 * (0.5 + 1e-4)).all()
    exact = torch.randint(-127, 128, shape).float()
    exact[:, 0] = 127
    assert torch.equal(kernels.pack(exact * 0.5, "int8").dense(), exact * 0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_rounded_once(shape: tuple[int, int]) -> None:
    """Blocks in another order, or padding among the outputs."""
    weight = matrix(*shape)
    assert torch.equal(kernels.pack(weight, "bfloat16").dense(), weight.bfloat16())


@each_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmuls_are_those_of_the_dense_weight(shape: tuple[int, int], bias: bool, format: str) -> None:
    """Rows or blocks that are swapped, a lost bias or scale, or padding that reaches the output."""
    outputs, columns = shape
    packed = kernels.pack(matrix(*shape), format)
    b = matrix(outputs, 1)[:, 0].to(packed.dtype) if bias else None
    for rows in (1, 2, FEW, FEW + 1, 20):
        x = matrix(rows, columns).to(packed.dtype)
        sums = F.linear(x.double(), packed.dense().double())
        exact = sums if b is None else sums + b.double()
        # bfloat16: one rounding of the matmul, one after the bias.
        bound = (sums.abs() + exact.abs()) * (2**-8 if format == "bfloat16" else 2**-20) + 1e-4
        for leading in ((rows,), (1, rows)):
            with torch.no_grad():
                y = kernels.linear(x.view(*leading, columns), packed, b)
            assert (y.shape, y.dtype) == ((*leading, outputs), packed.dtype)
            assert y.is_contiguous()
            assert ((y.double().view(rows, outputs) - exact).abs() <= bound).all()
        with_gradients = kernels.linear(x.clone().requires_grad_(), packed, b)
        assert ((with_gradients.double() - exact).abs() <= bound).all()


@each_format
def test_gradients_of_the_input(format: str) -> None:
    """An adapter or embedding before a packed layer that gets no gradient."""
    packed, x = kernels.pack(matrix(65, 16), format), matrix(3, 16)
    x = x.to(packed.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.linear(x, packed).sum(), x)
    expected = packed.dense().sum(0).expand(3, 16)
    torch.testing.assert_close(gradient, expected, rtol=2**-6, atol=2**-6)


@each_format
def test_a_packed_weight_behaves_as_its_dense_values(format: str) -> None:
    """An embedding of other rows, or an operation on the table instead of the values."""
    packed = kernels.pack(matrix(200, 40), format)
    dense, index = packed.dense(), torch.tensor([[0, 199], [57, 96]])
    assert torch.equal(F.embedding(index, packed), dense[index])
    assert torch.equal(F.embedding(index.int(), packed), dense[index])
    assert torch.equal(packed + 1, dense + 1)
    assert torch.equal(packed[3], dense[3])
    assert torch.equal(packed.to(torch.float64), dense.to(torch.float64))
    assert (packed.shape, packed.dtype, packed.numel()) == (dense.shape, dense.dtype, dense.numel())


@each_format
def test_copies_are_packed(format: str) -> None:
    """A copy, or a model that is read from a pickle, with other values."""
    layer = nn.Embedding(70, 8)
    layer.weight = nn.Parameter(kernels.pack(matrix(70, 8), format), requires_grad=False)
    index = torch.arange(70)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other.weight, kernels.PackedWeight)
        assert torch.equal(other(index), layer(index))
        assert other.weight.table.data_ptr() != layer.weight.table.data_ptr()


@each_format
def test_writing_is_refused(format: str) -> None:
    """A write that changes a temporary copy and is lost."""
    packed = kernels.pack(matrix(5, 4), format)
    for write in (packed.zero_, lambda: packed.copy_(torch.ones(5, 4)), lambda: packed.add_(1)):
        with pytest.raises(RuntimeError, match=r"PackedWeight: aten\.\w+ writes to it, expected a weight"):
            write()


def test_wrong_arguments_are_refused() -> None:
    """A format that is taken for another, or a tensor that is not a matrix."""
    with pytest.raises(ValueError, match="pack: format is 'int4', expected one of bfloat16, int8"):
        kernels.pack(torch.zeros(2, 2), "int4")
    for weight in (torch.zeros(2), torch.zeros(2, 2, device="meta")):
        with pytest.raises(
            ValueError, match=r"pack: weight has . dimensions on .*, expected a matrix on a CPU"
        ):
            kernels.pack(weight, "int8")
