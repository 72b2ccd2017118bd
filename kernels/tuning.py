"""The table of tiles, and of where the reference is the faster choice.

A tile is looked up by (architecture, op, shape class, dtype). Until a GPU has measured a row, it holds what
compiles ahead of time without spilling (`python -m bench.aot`); an architecture without rows takes tiles that
fit the smallest shared memory of the supported GPUs (99 KB).
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import torch

from kernels.dispatch import capability_of

SHARED_MEMORY = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # KB that one block may take, by architecture
REGISTERS = 65536  # of a multiprocessor, on all of them


class Tile(NamedTuple):
    """Block sizes (rows of the output, columns or keys), warps per program and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 for anything but CUDA, which is to say the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = capability_of(device)
    return major * 10 + minor


class Slower(NamedTuple):
    """A row: where a GPU has shown an op's reference to be faster than its kernel."""

    architecture: int
    op: str
    dtype: torch.dtype
    sizes: dict[str, tuple[int, int]]  # the least and the most of each


SLOWER: tuple[Slower, ...] = ()


def slower(op: str, tensor: torch.Tensor, **sizes: int) -> str | None:
    """Why "auto" takes the reference for a call of `op` with `sizes` in `tensor`'s dtype and on its device,
    if it does."""
    if not SLOWER or tensor.device.type != "cuda":
        return None
    major, minor = capability_of(tensor.device)
    call = (major * 10 + minor, op, tensor.dtype)
    if any(
        row[:3] == call and all(low <= sizes[n] <= high for n, (low, high) in row.sizes.items())
        for row in SLOWER
    ):
        return f"the tuning table has the reference faster on sm_{call[0]}"
    return None


Row = TypeVar("Row")


class AttentionTiles(NamedTuple):
    """Causal attention's tiles at one head dimension: of the forward pass, of dQ, of dK with dV, and of the
    smaller passes."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    delta: Tile = Tile(64, 64, 4, 1)
    five: Tile | None = None  # the five-product backward's, where a GPU has shown it faster


_GENERATION = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 86}  # a GPU that is not here takes 86's tiles
_ATTENTION = {  # generation -> largest head dimension -> tiles, for 16-bit inputs
    80: {
        64: AttentionTiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
        128: AttentionTiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        256: AttentionTiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    },
    86: {
        64: AttentionTiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
        128: AttentionTiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        256: AttentionTiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),
    },
    90: {
        64: AttentionTiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: AttentionTiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3)),
        256: AttentionTiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    },
    100: {
        64: AttentionTiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: AttentionTiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: AttentionTiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),
    },
}
_ATTENTION_INTERPRETED = AttentionTiles(Tile(32, 16), Tile(32, 16), Tile(16, 32), Tile(16, 16))
_ATTENTION_DROPOUT = {  # every generation: the mask takes registers
    64: AttentionTiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    128: AttentionTiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 64, 8, 2)),
    256: AttentionTiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
}
_ATTENTION_GROUPED = {
    64: Tile(32, 128, 8, 2),
    128: Tile(32, 64, 8, 2),
    256: Tile(16, 32, 4, 1),
}  # dK with dV, over query heads
ATTENTION_FIVE = {
    64: Tile(32, 128, 8, 2),
    128: Tile(32, 64, 8, 2),
}  # fits every generation: compiled, chosen by none
_ATTENTION_FLOAT32 = {
    32: AttentionTiles(Tile(64, 32), Tile(32, 32), Tile(32, 32)),
    64: AttentionTiles(Tile(32, 32), Tile(32, 32), Tile(32, 32)),
    128: AttentionTiles(Tile(32, 16), Tile(32, 32), Tile(16, 32, 4, 1)),
    256: AttentionTiles(Tile(32, 16), Tile(16, 16), Tile(16, 16), Tile(32, 32)),
}


def attention_tiles(
    architecture: int, itemsize: int, d: int, *, dropout: bool, grouped: bool
) -> AttentionTiles:
    """For float32 (`itemsize` 4) or 16-bit inputs and head dimension `d`; `grouped` if query heads share key
    heads."""
    if architecture == 0:
        return _ATTENTION_INTERPRETED
    if itemsize == 4:
        return _narrowest(_ATTENTION_FLOAT32, d)
    if dropout:
        return _narrowest(_ATTENTION_DROPOUT, d)
    tiles = _narrowest(_ATTENTION[_GENERATION.get(architecture, 86)], d)
    return tiles._replace(dkdv=_narrowest(_ATTENTION_GROUPED, d), five=None) if grouped else tiles


def _narrowest(rows: dict[int, Row], d: int) -> Row:
    return next(row for width, row in rows.items() if d <= width)


def attention_decode_tile(architecture: int, itemsize: int, d: int) -> Tile:
    """As `attention_tiles`: a tile of queries that share a key head, by keys."""
    if architecture == 0:
        return Tile(16, 16)
    return Tile(16, 128 * 64 // max(64, next_power_of_2(d)) * 2 // itemsize, 4, 2)


def attention_decode_splits(device: torch.device, programs: int, keys: int, block_n: int) -> int:
    """Into how many parts the keys are split, so that `programs` times as many fill the GPU twice."""
    multiprocessors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    )
    wanted = -(-2 * multiprocessors // max(1, programs))
    return max(1, min(wanted, -(-keys // block_n), 64))


NORM_COLUMNS = 32768  # the longest row that LayerNorm's kernels hold in registers


@functools.cache
def norm_tile(c: int) -> Tile:
    """LayerNorm: rows and width of the sub-tiles, whose cdiv(c, block_n) <= 8 make up whole rows with the
    fewest dead columns.

    Pieces of 256, where they do, let one warp hold a row with 16-byte accesses; a thread holds at most 32
    elements of a row.
    """
    widths = [width for width in (2**i for i in range(4, 16)) if -(-c // width) <= 8]
    width = min(widths, key=lambda w: (-(-c // w) * w, w != 256, -w))
    columns = -(-c // width) * width
    rows = min(32, next_power_of_2(max(1, 4096 // columns) + 1) // 2)
    return Tile(rows, width, num_warps=min(16, max(4, next_power_of_2(columns // 1024))), num_stages=1)


def norm_registers(c: int) -> int:
    """The most that a thread of LayerNorm's backward takes, by the ahead-of-time report for sm_90."""
    tile = norm_tile(c)
    elements = tile.block_m * -(-c // tile.block_n) * tile.block_n // (32 * tile.num_warps)
    return 168 if elements <= 24 else 240


def norm_programs(device: torch.device, n: int, c: int) -> int:
    """How many programs share the rows of LayerNorm's backward."""
    tile = norm_tile(c)
    return min(-(-n // tile.block_m), _at_once(device, tile.num_warps, norm_registers(c)))


def _at_once(device: torch.device, num_warps: int, registers: int) -> int:
    """How many programs a device runs at once: more of them would begin when the first have ended, and find
    it idle."""
    multiprocessors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return multiprocessors * max(1, REGISTERS // (32 * num_warps * registers))


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def loss_tile(v: int) -> Tile:
    """Rows and columns of the logits that one program of the loss works on at a time."""
    width = min(4096, next_power_of_2(v))
    return Tile(max(1, min(32, 2048 // width)), width, num_warps=8 if width == 4096 else 4, num_stages=1)


def loss_chunk_rows(device: torch.device, v: int) -> int:
    """Rows of logits held at once: 512 MiB of 16-bit logits on a GPU, 128 MiB of float32 ones elsewhere."""
    return max(16, (2**28 if device.type == "cuda" else 2**25) // v // 16 * 16)


GELU_REGISTERS = (
    96  # the most that a thread of the derivative's pass takes, by the ahead-of-time report for sm_90
)


def gelu_tile(f: int) -> Tile:
    """Rows and columns of one step of the passes between the feed-forward's products."""
    width = min(512, next_power_of_2(f))
    return Tile(min(32, 2048 // width), width, num_warps=4, num_stages=1)


def gelu_programs(device: torch.device, n: int, f: int) -> int:
    """How many programs share the rows of the feed-forward's backward pass, for each block of columns."""
    tile = gelu_tile(f)
    at_once = _at_once(device, tile.num_warps, GELU_REGISTERS)
    return min(-(-n // tile.block_m), max(1, at_once // -(-f // tile.block_n)))


def gelu_gemm_tile(architecture: int, itemsize: int, m: int, n: int, k: int) -> Tile | None:
    """The tile of the product with bias and GELU in its epilogue, where a GPU has shown it faster than two
    steps: nowhere yet."""
    return None
