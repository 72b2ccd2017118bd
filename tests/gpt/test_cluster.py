"""The prediction for several GPUs: the bytes they exchange, what hides, and the memory of each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gpt import GPT, GPTConfig, InputError
from gpt import cluster as c
from gpt.device import find_gpu
from gpt.step_time import BF16, FP32, predict

GPT2 = GPTConfig.preset("gpt2")
# Every size is a multiple of 64, so that no shard is padded.
EVEN = GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=256, bias=False)
UNEVEN = GPTConfig(vocab_size=65, block_size=30, n_layer=2, n_head=3, n_embd=36, tie_weights=False)
H200 = find_gpu("h200")


def predicted(
    world: int,
    config: GPTConfig = GPT2,
    micro_batches: int = 1,
    batch_size: int = 12,
    link: float = 450e9,
    **options: Any,
) -> c.ClusterPrediction:
    cluster = c.Cluster(world, link, **options)
    return c.predict_cluster(config, H200, batch_size, micro_batches * world, cluster)


@pytest.mark.parametrize("world", [2, 8, 512])
@pytest.mark.parametrize("config", [GPT2, UNEVEN], ids=["gpt2", "untied"])
def test_ddp_sends_every_gradient_once(world: int, config: GPTConfig) -> None:
    """A gradient in no bucket or in two, a sum in every micro-batch, or a factor other than 2(n-1)/n."""
    gradients = FP32 * config.parameter_counts()["total"]
    for micro_batches in (1, 3):
        sent = predicted(world, config, micro_batches).sent
        assert sent == pytest.approx(2 * (world - 1) / world * gradients)
    assert predicted(2, config).sent == pytest.approx(gradients)
    assert predicted(2**16, config).sent == pytest.approx(2 * gradients, rel=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_fsdp_sends_what_it_gathers_and_reduces(micro_batches: int) -> None:
    """Blocks gathered once or in float32, the outside gathered twice, gradients reduced in 16 bits."""
    blocks = 4 * EVEN.parameter_counts()["block"]
    outside = EVEN.parameter_counts()["total"] - blocks
    prediction = predicted(8, EVEN, micro_batches, parallel="fsdp")
    expected = 7 / 8 * (2 * BF16 * blocks + FP32 * outside + FP32 * (blocks + outside))
    assert prediction.sent == pytest.approx(micro_batches * expected)
    assert prediction.across == 0


@pytest.mark.parametrize("shards", [1, 7, 8, 512])
def test_a_shard_has_the_rows_that_torch_gives_it(shards: int) -> None:
    """Shards of P / n elements: torch divides rows, so that a shard of a short parameter has one row more."""
    model = GPT(UNEVEN, device="cpu")

    def largest(parameters: Any) -> int:
        return sum(p.chunk(shards)[0].numel() for p in parameters)

    counts = UNEVEN.parameter_counts(shards)
    assert counts["total"] == largest(model.parameters())
    assert counts["block"] == largest(model.blocks[0].parameters())
    gathers = [t for t in predicted(shards, UNEVEN, parallel="fsdp", per_node=1).transfers if t.count == 4]
    assert [t.sent for t in gathers] == ([BF16 * (shards - 1) * counts["block"]] if shards > 1 else [])


def test_a_shard_of_one_gpu_is_ddp() -> None:
    """Gathers among a single GPU, or copies of a shard that are not summed."""
    alone, ddp = predicted(64, EVEN, parallel="fsdp", shard_size=1), predicted(64, EVEN)
    assert {t.op for t in alone.transfers} == {"all-reduce"}
    assert alone.sent == pytest.approx(ddp.sent)
    assert alone.across == pytest.approx(ddp.across)
    assert alone.memory == ddp.memory


def test_hybrid_sharding_crosses_machines_with_shards_alone() -> None:
    """Gathers between machines, or an all-reduce of whole gradients instead of shards."""
    hybrid = predicted(64, EVEN, parallel="fsdp", shard_size=8)
    gradients = FP32 * EVEN.parameter_counts()["total"]
    assert hybrid.across == pytest.approx(2 * 7 / 8 * gradients / 8)
    within = predicted(8, EVEN, parallel="fsdp")
    assert hybrid.sent - hybrid.across == pytest.approx(within.sent)
    assert hybrid.memory == within.memory
    all_shards = [predicted(64, EVEN, parallel="fsdp", shard_size=size) for size in (64, None)]
    assert all_shards[0].transfers == all_shards[1].transfers


def test_a_ring_crosses_once_for_each_machine() -> None:
    """All bytes counted on the network, or none: of 8 GPUs of a machine, one sends to the next machine."""
    ddp = predicted(64)
    assert ddp.across == pytest.approx(ddp.sent / 8)
    assert predicted(8).across == 0
    single = predicted(8, per_node=1)
    assert single.across == single.sent
    pairs = predicted(16, EVEN, parallel="fsdp", shard_size=4)  # two GPUs of a machine hold the same shard
    assert pairs.across == pytest.approx(2 * 3 / 4 * FP32 * EVEN.parameter_counts()["total"] / 4 / 2)


def test_a_collective_takes_its_bytes_over_the_link() -> None:
    """A time from both directions of a link, from bits, or without the hops that dominate on many GPUs."""
    cluster = c.Cluster(8, 100e9)
    transfer = cluster.transfer("", "all-reduce", 8e9, 1)
    assert transfer.sent == 14e9
    assert transfer.seconds == pytest.approx(14e9 / (100e9 * 741 / 900) + 8.4e-6 + 2 * 7 * 3.4e-6)
    many = c.Cluster(512, math.inf, "fsdp", node_link=math.inf)
    gather = many.transfer("", "all-gather", 1e6, 1)
    assert gather.seconds == pytest.approx(8.4e-6 + 448 * 3.4e-6 + 63 * 14e-6)
    tree = c.Cluster(512, math.inf, node_link=math.inf).transfer("", "all-reduce", 1e6, 1)
    assert tree.seconds == pytest.approx(8.4e-6 + 2 * (7 * 3.4e-6 + 6 * 14e-6))
    slow = c.Cluster(16, math.inf, node_link=1e9).transfer("", "all-reduce", 16e9, 1)
    assert slow.seconds == pytest.approx(30e9 / 8 / 0.9e9, rel=1e-3)


def test_ddp_exposes_what_outlasts_the_backward_pass() -> None:
    """Transfers added to the step although backward hides them, or all of them hidden, the last one too."""
    fast = predicted(8)
    block, last = fast.transfers[1:]  # a bucket for each block, and one for the tied embedding
    assert (block.count, last.count) == (11, 1)
    _, backward, embeddings = c._passes(fast.one)
    assert embeddings < block.seconds < backward
    assert fast.exposed_seconds == pytest.approx(block.seconds - embeddings + last.seconds)
    slow = predicted(8, link=450e6)
    assert slow.exposed_seconds == pytest.approx(slow.transfer_seconds - 11 * backward - embeddings)
    four = predicted(8, micro_batches=4)
    assert four.exposed_seconds == pytest.approx(fast.exposed_seconds)


def test_fsdp_exposes_what_the_blocks_do_not_hide() -> None:
    """A first gather or a last reduction that something hides, or one micro-batch's wait instead of all."""
    fast = predicted(8, parallel="fsdp")
    root, gather, scatter, last = (t.seconds for t in fast.transfers)
    _, _, embeddings = c._passes(fast.one)
    waits = root + 2 * gather + max(0, scatter - embeddings) + last
    assert fast.exposed_seconds == pytest.approx(waits)
    assert predicted(8, micro_batches=3, parallel="fsdp").exposed_seconds == pytest.approx(3 * waits)

    slow = predicted(8, link=450e6, parallel="fsdp")
    forward, backward, embeddings = c._passes(slow.one)
    hidden = 11 * forward + 12 * backward + embeddings
    assert slow.exposed_seconds == pytest.approx(slow.transfer_seconds - hidden)


@pytest.mark.parametrize(
    "options", [{}, {"parallel": "fsdp"}, {"parallel": "fsdp", "shard_size": 8}], ids=str
)
@pytest.mark.parametrize("config", [GPT2, UNEVEN], ids=["gpt2", "untied"])
def test_a_faster_link_never_slows_a_step(config: GPTConfig, options: dict[str, Any]) -> None:
    """A rate that multiplies, or a wait that is longer than the transfers."""
    before = math.inf
    for speed in (1e8, 1e9, 1e10, 1e11, 1e12):
        prediction = predicted(64, config, link=speed, node_link=speed / 8, **options)
        assert prediction.seconds <= before
        assert 0 < prediction.exposed_seconds <= prediction.transfer_seconds
        before = prediction.seconds


@pytest.mark.parametrize("options", [{"parallel": "ddp"}, {"parallel": "fsdp"}], ids=str)
def test_one_gpu_is_the_prediction_of_one(options: dict[str, Any]) -> None:
    """Another figure for the same run, or transfers between one GPU and itself."""
    for captured in (True, False):
        prediction = c.predict_cluster(GPT2, H200, 2, 3, c.Cluster(1, 450e9, **options), captured=captured)
        assert prediction.one == predict(GPT2, H200, 2, 3, captured=captured)
        assert prediction.seconds == prediction.one.seconds
        assert (prediction.transfers, prediction.exposed_seconds) == ((), 0)
        assert (prediction.efficiency, prediction.tokens) == (1, prediction.one.tokens)
        assert prediction.memory == GPT2.training_memory(2, 2)


def test_each_gpu_updates_its_shard() -> None:
    """An update of all parameters under fsdp, or its time removed under ddp."""
    one = predicted(8).one
    update = sum(one.seconds_of(part) for part in one.components if part.name in ("clipping", "AdamW"))
    for options, saved in (
        ({}, 0.0),
        ({"parallel": "fsdp"}, 7 / 8),
        ({"parallel": "fsdp", "shard_size": 2}, 1 / 2),
    ):
        prediction = predicted(8, **options)
        expected = one.gpu_seconds - saved * update + prediction.exposed_seconds
        assert prediction.seconds == pytest.approx(expected)
        assert prediction.efficiency == pytest.approx(one.seconds / expected)
    tiny = predicted(8, EVEN, batch_size=1)
    assert tiny.seconds == tiny.one.host_seconds  # the step runs without a CUDA graph


def test_every_component_has_its_pass() -> None:
    """A component of the step that hides no transfers because its name is not in the tables."""
    names = {part.name for part in predict(replace(GPT2, dropout=0.1), H200, 1, 2).components}
    assert names == {*c._BLOCKS, *c._EMBEDDINGS, *c._LOSS, *c._UPDATE}


def test_memory_shrinks_with_the_shards() -> None:
    """State that every GPU keeps whole, or a shard without what is gathered around it."""
    sizes = [GPT2.training_bytes(1, 2, shards=shards) for shards in (2, 4, 8, 64, 512)]
    assert sizes == sorted(sizes, reverse=True)
    memory = EVEN.training_memory(3, 2, shards=8)
    counts = EVEN.parameter_counts()
    block, outside = counts["block"], counts["total"] - 4 * counts["block"]
    assert memory["weights"] + memory["gradients"] + memory["averages of AdamW"] == 2 * counts["total"]
    assert memory["gathered, in flight"] == 8 * outside + (3 * 2 + 4) * block
    assert memory["activations"] == EVEN.training_bytes(3, 2) - EVEN.training_bytes(0, 2)
    assert EVEN.training_bytes(3, 2, shards=1) == EVEN.training_bytes(3, 2)
    assert sum(memory.values()) == EVEN.training_bytes(3, 2, shards=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("900GB/s", 900e9), ("400Gb/s", 50e9), ("1.8 TB/s", 1.8e12), ("3.2Tb/s", 4e11)],
)
def test_a_rate_is_read_in_its_unit(text: str, expected: float) -> None:
    """Bits that are read as bytes."""
    assert c.rate("--link", text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["900", "900GB", "GB/s", "-1GB/s", "0Gb/s", "nanGB/s", "9e9GB/s", "٣GB/s", ""]
)
def test_a_rate_without_a_unit_is_refused(text: str) -> None:
    """A number that is read in a unit that nobody stated."""
    with pytest.raises(
        InputError, match=r"^--link is .*, expected bytes or bits per second, as in 900GB/s or "
    ):
        c.rate("--link", text)
