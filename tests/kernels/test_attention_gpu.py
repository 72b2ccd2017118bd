"""Attention on a GPU: synchronisation, CUDA graphs, other devices. test_ops runs the registry's cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kernels

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    with kernels.use_backend("triton"):
        yield


def qkv(t: int = 256, device: str = "cuda") -> list[torch.Tensor]:
    return [x.requires_grad_() for x in torch.randn(3, 2, 4, t, 64, device=device, dtype=torch.bfloat16)]


@pytest.mark.driver("torch's check for synchronisations needs a CUDA context")
@pytest.mark.parametrize("seed", [None, 7, "tensor"])
def test_no_host_synchronisation(seed: int | str | None) -> None:
    """A call that synchronises with the GPU: a seed, a key_start or a length that is read on the host."""
    q, k, v = qkv()
    start = torch.arange(256, device="cuda", dtype=torch.int32).expand(2, 256) // 2
    chosen = torch.tensor(7, device="cuda") if seed == "tensor" else seed
    lengths = torch.tensor([256, 100], device="cuda", dtype=torch.int32)

    def step() -> None:
        kernels.causal_attention(q, k, v, key_start=start, dropout_p=0.1, seed=chosen).sum().backward()
        kernels.decode_attention(q[:, :, :1].detach(), k.detach(), v.detach(), lengths)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.driver("CUDA graphs")
def test_a_graph_sees_new_seeds() -> None:
    """A seed whose value at capture is a constant of the CUDA graph."""
    q, k, v = (x.detach() for x in qkv())
    seed = torch.tensor(1, device="cuda")
    kernels.causal_attention(q, k, v, dropout_p=0.3, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.causal_attention(q, k, v, dropout_p=0.3, seed=seed)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, kernels.causal_attention(q, k, v, dropout_p=0.3, seed=value))


@pytest.mark.driver("CUDA graphs")
def test_a_graph_sees_a_growing_cache() -> None:
    """A length whose value at capture is a constant of the CUDA graph."""
    q, k, v = (x.detach() for x in qkv())
    lengths = torch.tensor([10, 20], device="cuda", dtype=torch.int32)
    kernels.decode_attention(q[:, :, :1], k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(q[:, :, :1], k, v, lengths)
    for more in (0, 64, 200):
        lengths.copy_(torch.tensor([10 + more, 20 + more], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, kernels.decode_attention(q[:, :, :1], k, v, lengths))


@pytest.mark.driver("two GPUs")
def test_tensors_on_a_device_that_is_not_current() -> None:
    """Kernels that are launched on the current device although their tensors are on another."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: there is no other device")
    results = [kernels.causal_attention(*(x.detach().to(f"cuda:{i}") for x in qkv())) for i in (0, 1)]
    assert results[1].device.index == 1
    assert torch.cuda.current_device() == 0


@pytest.mark.driver("Inductor compiles for a CUDA device")
def test_compiled_code_agrees_with_eager() -> None:
    """A graph break on a GPU, or compiled code with other values."""
    q, k, v = qkv()
    seed = torch.tensor(3, device="cuda")
    compiled = torch.compile(kernels.causal_attention, fullgraph=True)
    outputs = [
        function(q, k, v, dropout_p=0.1, seed=seed) for function in (kernels.causal_attention, compiled)
    ]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in outputs]
    assert all(torch.equal(eager, actual) for eager, actual in zip(*gradients, strict=True))
