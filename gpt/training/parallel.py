"""Data parallelism by PyTorch's own engines: how the ranks of a run share its model.

`ddp`: every rank has the whole model, and DistributedDataParallel averages the gradients while the backward
pass goes on. `fsdp`: FSDP2 shards parameters, gradients and the optimizer's state over the ranks, and gathers
one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kernels
from gpt.config import TrainConfig
from gpt.device import autocast_dtype
from gpt.model import GPT
from gpt.training.distributed import Ranks

BUCKET_MB = 25  # of gradients in an all-reduce of DDP
SHARD, REPLICATE = "shard", "replicate"  # dimensions of the device mesh


def shards(config: TrainConfig, ranks: Ranks) -> int:
    """How many ranks share the parameters of a run, as shards; 0 if each has all of them."""
    return (config.shard_size or ranks.size) if ranks.size > 1 and config.parallel == "fsdp" else 0


def parallelize(
    model: GPT, device: torch.device, config: TrainConfig, ranks: Ranks
) -> Callable[..., Tensor] | None:
    """Moves `model` to `device`, and lets the ranks share it.

    The parameters of rank 0 become those of all. With fsdp the parameters become DTensors in place, and keep
    their names. Every rank must call this.

    Returns:
        Computes the loss in training steps; None is the model itself.
    """
    model.to(device)
    if ranks.size == 1:
        return torch.compile(model) if config.compile else None
    if size := shards(config, ranks):
        _shard(model, device, config, size=size, copies=ranks.size // size)
        return None
    module = _replicate(model)
    return torch.compile(module) if config.compile else module


def _replicate(model: GPT) -> nn.Module:
    """`model` in DDP, which has divided the gradients into its final buckets.

    DDP does so after its first backward pass, in the order of that pass. A sum over ranks is rounded by an
    element's place in its bucket, so without that pass the first step after a resume would differ from the
    same step of a run that was not interrupted.
    """
    module = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    training = model.training
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with kernels.use_backend("reference"):
        module.eval()(token, token).backward()
    module.train(training)
    module.zero_grad()
    return module


def _shard(model: GPT, device: torch.device, config: TrainConfig, *, size: int, copies: int) -> None:
    """Shards each block, and what is outside the blocks, over groups of `size` ranks: `copies` groups.

    The blocks compute in the run's dtype with weights that are gathered in it; gradients are reduced in
    float32. What is outside the blocks stays float32, and so does the residual stream.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)

    dims = {SHARD: size} if copies == 1 else {REPLICATE: copies, SHARD: size}
    mesh = init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
    dtype = autocast_dtype(config.dtype, device)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if config.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def accumulating(forward: Callable[..., Tensor] | None, *, last: bool) -> AbstractContextManager[object]:
    """The context of a micro-batch's passes: DDP sums gradients over ranks after the last one alone.

    FSDP2 does so for each micro-batch, so that the gradients stay sharded.
    """
    module = getattr(forward, "_orig_mod", forward)  # of a compiled module
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def gradient_norms(gradients: list[Tensor], *, sharded: bool) -> Tensor:
    """The norm of each gradient, of all its shards; in one float32 tensor."""
    if not sharded:
        return torch.stack(torch._foreach_norm(gradients))
    from torch.distributed.tensor import DTensor

    local = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    squares = torch.stack(torch._foreach_norm(local)).double().square()  # float32 could overflow
    dist.all_reduce(squares, group=gradients[0].device_mesh.get_group(SHARD))  # type: ignore[attr-defined]
    return squares.sqrt().float()


def whole(model: GPT, ranks: Ranks) -> GPT:
    """On rank 0, a plain GPT with the parameters of a sharded `model`; on the others `model`.

    Every rank must call this.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters = get_model_state_dict(model, options=options)
    if ranks.rank:
        return model
    copy = GPT(model.config, use_triton=model.use_triton, device=model.device)
    copy.load_state_dict(parameters)
    return copy
