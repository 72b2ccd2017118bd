"""`kernels.dropout`: its masks, its scale, its randomness, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.philox import keep_mask

CPU = torch.device("cpu")
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.kernels)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(17,), (3, 20), (2, 3, 18), (0, 8), (3, 0)])
def test_masks_are_those_of_add_layer_norm(shape: tuple[int, ...], backend: str) -> None:
    """A counter, threshold or scale that differs from the one that add_layer_norm uses for the same seed."""
    x, seed = torch.randn(shape), 2**40 + 3
    if 0 in shape:
        assert kernels.dropout(x, 0.4, seed=seed).shape == shape
        return
    with kernels.use_backend(backend):
        actual = kernels.dropout(x, 0.4, seed=seed)
        _, expected = kernels.add_layer_norm(
            x, torch.zeros_like(x), torch.ones(shape[-1]), dropout_p=0.4, seed=seed
        )
    assert torch.equal(actual, expected)
    assert torch.equal(actual != 0, keep_mask(seed, shape, 0.4, CPU))
    torch.testing.assert_close(actual[actual != 0], (x / 0.6)[actual != 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_may_be_a_tensor(backend: str) -> None:
    """A seed tensor that gives another mask than the same int, or a seed that is ignored."""
    x = torch.ones(6, 40)
    with kernels.use_backend(backend):
        first, second, other = (
            kernels.dropout(x, 0.5, seed=seed) for seed in (-9, torch.tensor(-9), torch.tensor(-8))
        )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_seed_draws_from_torch(backend: str) -> None:
    """A mask that repeats from call to call, that torch.manual_seed does not fix, or with another share."""
    x = torch.ones(200, 50)
    with kernels.use_backend(backend):
        torch.manual_seed(1)
        first, second = kernels.dropout(x, 0.25), kernels.dropout(x, 0.25)
        torch.manual_seed(1)
        assert torch.equal(kernels.dropout(x, 0.25), first)
    assert not torch.equal(first, second)
    share = (first != 0).double().mean().item()
    assert abs(share - 0.75) <= 5 * (0.25 * 0.75 / x.numel()) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_probability_changes_nothing(backend: str) -> None:
    """A p of 0 that rounds, copies or draws from torch's generator."""
    x, state = torch.randn(3, 8), torch.get_rng_state()
    with kernels.use_backend(backend):
        assert kernels.dropout(x, 0) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.kernels
def test_backward_keeps_the_seed_only() -> None:
    """A backward pass that holds the input or a mask in memory."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with kernels.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kernels.dropout(torch.randn(5, 16, requires_grad=True), 0.5, seed=1)
    assert saved == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend: str) -> None:
    """A float32 residual stream that dropout rounds to bfloat16 under autocast."""
    with kernels.use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert kernels.dropout(torch.ones(2, 8, dtype=dtype), 0.5, seed=1).dtype == dtype
