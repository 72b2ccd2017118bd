"""The tuning table: the tile of each kernel, and where the reference is faster than the kernel.

A tile is looked up by architecture, op, shape class and dtype. A row that no GPU has measured yet holds a
tile chosen from the ahead-of-time report (`python -m bench.aot`): its loops prefetch and hardly spill, and as
many programs as possible fit on a multiprocessor. An architecture without rows takes tiles that fit the
smallest shared memory of the supported GPUs (99 KB). An H200 has measured sm_90: bench/README.md, entry 18.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import torch

from kernels.dispatch import capability_of

# Architecture -> KB of shared memory that one block may take.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REGISTERS = 65536  # per multiprocessor, on every architecture


class Tile(NamedTuple):
    """Block sizes, warps, pipeline stages and register limit of a kernel."""

    block_m: int  # rows per tile: queries in attention
    block_n: int  # columns per tile: keys in attention
    num_warps: int = 4  # per program
    num_stages: int = 2  # of the software pipeline; a loop prefetches from 3 on
    maxnreg: int | None = None  # the most registers per thread; None leaves them to the compiler
    pdl: bool = False  # programmatic dependent launch, from sm_90 on


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 for a device other than CUDA, where kernels run in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = capability_of(device)
    return major * 10 + minor


class Slower(NamedTuple):
    """Sizes at which an op's kernel was measured to be slower than its reference."""

    architecture: int
    op: str
    dtype: torch.dtype
    sizes: dict[str, tuple[int, int]]  # dimension -> smallest and largest size


# The GPU's time alone on an H200, forward and backward, against cuDNN: bench/README.md, entry 18.
SLOWER: tuple[Slower, ...] = (
    Slower(90, "causal_attention", torch.bfloat16, {"D": (128, 128), "Tq": (1024, 4096)}),
    Slower(90, "causal_attention", torch.bfloat16, {"D": (64, 64), "Tq": (2048, 4096)}),
)


def slower(op: str, tensor: torch.Tensor, **sizes: int) -> str | None:
    """The reason to take the reference in "auto", if the table has it faster than the kernel.

    sizes: the sizes of the call's dimensions, by name. tensor: an argument, for its dtype and device.
    """
    if not SLOWER or tensor.device.type != "cuda":
        return None
    major, minor = capability_of(tensor.device)
    call = (major * 10 + minor, op, tensor.dtype)
    for row in SLOWER:
        if row[:3] == call and all(low <= sizes[name] <= high for name, (low, high) in row.sizes.items()):
            return f"the tuning table has the reference faster on sm_{call[0]}"
    return None


Row = TypeVar("Row")


class AttentionTiles(NamedTuple):
    """The tiles of causal attention's kernels at one head dimension."""

    forward: Tile
    dq: Tile
    dkdv: Tile  # dK and dV
    delta: Tile = Tile(64, 64, 4, 1)  # the small kernels of backward
    atomic: Tile | None = None  # backward's atomic form, where a GPU has shown it to be faster


# Architecture -> the architecture whose tiles it takes; one that is missing takes those of 86.
_SHARED_ROWS = {80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 86}
# Architecture -> largest head dimension -> tiles, for 16-bit inputs.
_ATTENTION = {
    80: {
        64: AttentionTiles(Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: AttentionTiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 4, 3)),
        256: AttentionTiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    },
    86: {
        64: AttentionTiles(Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: AttentionTiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3)),
        256: AttentionTiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),
    },
    90: {
        64: AttentionTiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: AttentionTiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3, 128), Tile(64, 64, 4, 2)),
        256: AttentionTiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(32, 32, 4, 3)),
    },
    100: {
        64: AttentionTiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: AttentionTiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: AttentionTiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),
    },
}
_ATTENTION_INTERPRETED = AttentionTiles(Tile(32, 16), Tile(32, 16), Tile(16, 32), Tile(16, 16))
# On every architecture: smaller tiles, since the dropout mask takes registers.
_ATTENTION_DROPOUT = {
    64: AttentionTiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 4, 3)),
    128: AttentionTiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(32, 64, 4, 3)),
    256: AttentionTiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
}
# dK and dV where query heads share key heads.
_ATTENTION_GROUPED = {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 8, 3), 256: Tile(16, 32, 4, 1)}
# Tiles of the atomic form that fit every architecture: compiled ahead of time, and taken by no row yet.
ATTENTION_ATOMIC = {64: Tile(32, 128, 8, 3), 128: Tile(32, 64, 8, 3)}
_ATTENTION_FLOAT32 = {
    32: AttentionTiles(Tile(64, 32), Tile(32, 32), Tile(32, 32)),
    64: AttentionTiles(Tile(32, 32), Tile(32, 32), Tile(32, 32)),
    128: AttentionTiles(Tile(32, 16), Tile(32, 32), Tile(16, 32, 4, 1)),
    256: AttentionTiles(Tile(32, 16), Tile(16, 16), Tile(16, 16), Tile(32, 32)),
}


def attention_tiles(
    architecture: int, itemsize: int, d: int, *, dropout: bool, grouped: bool
) -> AttentionTiles:
    """The tiles of causal attention.

    itemsize: bytes of an input's element, 4 or 2. d: head dimension. grouped: query heads share key heads.
    """
    if architecture == 0:
        return _ATTENTION_INTERPRETED
    if itemsize == 4:
        return _narrowest(_ATTENTION_FLOAT32, d)
    if dropout:
        return _narrowest(_ATTENTION_DROPOUT, d)
    tiles = _narrowest(_ATTENTION[_SHARED_ROWS.get(architecture, 86)], d)
    return tiles._replace(dkdv=_narrowest(_ATTENTION_GROUPED, d), atomic=None) if grouped else tiles


def _narrowest(rows: dict[int, Row], d: int) -> Row:
    """The row of the smallest head dimension that is at least `d`."""
    return next(row for width, row in rows.items() if d <= width)


def starts_early(architecture: int) -> bool:
    """Whether a kernel of a decoded token starts before the launch ahead of it has ended (`Tile.pdl`).

    Older GPUs cannot. Only sm_90 was measured, in CUDA graphs: a token takes 0.85 of the time.
    """
    return architecture >= 90


def attention_decode_tile(architecture: int, itemsize: int, d: int, keys: int) -> Tile:
    """The tile of decoding: queries that share a key head, by keys; arguments as `attention_tiles`'.

    A short 16-bit cache has tiles of few keys and few warps: a part of its keys is one or two tiles, and the
    program that joins the parts has fewer warps to synchronise. On sm_90, the only architecture that was
    measured, 32 keys and one warp were the fastest of five tiles at 192 and at 1,000 keys. In a long cache,
    larger tiles keep more reads in flight.

    keys: the length of the cache.
    """
    if architecture == 0:
        return Tile(16, 16)
    columns = max(64, next_power_of_2(d))
    pdl = starts_early(architecture)
    if itemsize == 2 and keys <= 2048:
        return Tile(16, 32, columns // 64, 2, pdl=pdl)
    return Tile(16, 128 * 64 // columns * 2 // itemsize, 4, 2, pdl=pdl)


def attention_decode_splits(device: torch.device, programs: int, keys: int, tile: Tile) -> int:
    """How many parts decoding splits the keys into: enough for eight warps per multiprocessor.

    At most 16 for each warp of a program, which reads all parts at once when it joins them.

    programs: programs per part. keys: the length of the cache.
    """
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else 2
    wanted = -(-8 * multiprocessors // max(1, programs * tile.num_warps))
    return max(1, min(wanted, -(-keys // tile.block_n), 16 * tile.num_warps))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


NORM_COLUMNS = 32768  # the longest row that LayerNorm's kernels hold in registers


@functools.cache
def norm_tile(c: int, itemsize: int = 2) -> Tile:
    """The tile of LayerNorm at `c` columns: a whole row is cdiv(c, block_n) <= 8 tiles of one program.

    The width is the one with the fewest masked columns. Among equals it is 512 bytes, where one warp holds a
    row of a tile with 16-byte accesses, else the widest. A thread holds at most 32 elements of a row.

    itemsize: bytes of the widest element that is read or written. Only the width depends on it.
    """
    widths = [width for width in (2**i for i in range(4, 16)) if -(-c // width) <= 8]
    width = min(widths, key=lambda w: (-(-c // w) * w, w * itemsize != 512, -w))
    columns = -(-c // width) * width
    rows = min(32, next_power_of_2(max(1, 4096 // columns) + 1) // 2)
    return Tile(rows, width, num_warps=min(16, max(4, next_power_of_2(columns // 1024))), num_stages=1)


def norm_backward_tile(architecture: int, c: int, itemsize: int, *, dropout: bool) -> Tile:
    """The tile of LayerNorm's backward: as wide as `norm_tile`'s, at most 32 elements of all rows a thread.

    A program takes one row at a time, of short rows up to eight, as long as one warp holds them. With three
    stages it copies its next rows in the meantime; with two it would wait for a copy right after its start.
    A row of other than a multiple of 16 elements is read one element at a time: 2 bytes cannot be copied
    asynchronously. Measured on sm_90 only: within 4% of the best tile's time at 384 to 8,192 columns.
    """
    width = norm_tile(c, itemsize).block_n
    columns = -(-c // width) * width
    rows, warps = next_power_of_2(1024 // columns + 1) // 2, next_power_of_2(-(-columns // 1024))
    prefetches = architecture in (0, 90, 100) and c <= 8192 and c % 16 == 0  # limited by shared memory
    return Tile(min(8, max(1, rows)), width, num_warps=min(16, warps), num_stages=3 if prefetches else 1)


def norm_programs(device: torch.device, n: int, c: int, tile: Tile) -> int:
    """How many programs share the rows of LayerNorm's backward.

    8 warps a multiprocessor: an H200 is slower with 12 or 16 that prefetch, by 3 to 8% on average. 12 warps
    if they do not prefetch and hold at most 24 elements a thread, in 168 registers by the ahead-of-time
    report. More than the registers allow would start after the others have finished.
    """
    elements = tile.block_m * -(-c // tile.block_n) * tile.block_n // (32 * tile.num_warps)
    warps = 12 if tile.num_stages == 1 and elements <= 24 else 8
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else 1
    return min(-(-n // tile.block_m), multiprocessors * max(1, warps // tile.num_warps))


DECODE_COLUMNS = 16384  # the longest row of a weight that a program of decoding holds in registers


def decode_embedding_tile(architecture: int, c: int) -> Tile:
    """The tile of decoding's embedding at `c` columns: one program per tile of columns."""
    return Tile(1, min(256, next_power_of_2(c)), 1, 1, pdl=starts_early(architecture))


ARGMAX_COLUMNS = 2**30  # the longest row whose indices decoding's argmax holds in 32 bits


def decode_argmax_tile(architecture: int, itemsize: int, v: int) -> Tile:
    """The tile of decoding's argmax at `v` columns: one program per row, 16 bytes a thread and tile."""
    width = min(32 * 512 // itemsize, next_power_of_2(v)) if architecture else 32
    return Tile(1, width, max(1, width * itemsize // 512), 1, pdl=starts_early(architecture))


@functools.cache
def decode_linear_tile(architecture: int, itemsize: int, n: int, k: int, batch: int) -> Tile:
    """The tile of decoding's matmuls with a weight (n, k): rows and columns of the weight.

    A warp reads 512 bytes of a row at a time, 16 bytes a thread, and all reads of a program are in flight
    together. A row has 1 warp, or as many as it takes for at most 8 reads a thread.

    A warp that reads whole rows has up to 4 of them, with at most 12 reads a thread (8 for several sequences,
    whose sums take registers), as long as there is a program for each of 132 multiprocessors. A program then
    has up to 4 warps. A vocabulary takes many waves of programs, which are shorter with one warp. Where a row
    has several warps, a program takes up to 16 rows, as long as there are two programs for each
    multiprocessor and at most 8 reads a thread.

    With 168 registers, a multiprocessor has 12 warps at a time, and hardly a build of the ahead-of-time
    report for sm_90 spills. Only sm_90 was measured, at GPT-2 124M in bfloat16 and one sequence.

    batch: the number of sequences.
    """
    warp = 512 // itemsize  # columns
    per_row = next_power_of_2(-(-k // (8 * warp)))  # warps
    reads = -(-k // (per_row * warp))
    if architecture == 0:
        return Tile(32, per_row * warp, 16 * per_row, 1)

    if per_row == 1:
        most = 12 if batch == 1 else 8
        shapes = [(rows, warps) for rows in (4, 2, 1) for warps in (4, 2, 1) if rows * reads <= most]
        rows, warps = next((s for s in shapes if n >= 132 * s[0] * s[1]), (1, 1))
        if rows == 4 and n > 16384:
            warps = 1
        rows *= warps
    else:

        def fits(rows: int) -> bool:
            groups = -(-rows // max(1, 4 // per_row))  # of rows that are read together
            return n >= 2 * 132 * rows and groups * reads <= 8

        rows = next((rows for rows in (16, 8, 4, 2) if fits(rows)), 1)
        warps = max(per_row, min(4, per_row * rows))
    registers = 168 if warps <= 8 else None
    return Tile(rows, per_row * warp, warps, 1, maxnreg=registers, pdl=starts_early(architecture))


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def loss_tile(v: int, *, bias: bool) -> Tile:
    """The tile of the loss at a vocabulary of `v`: the logits that a program holds at a time.

    A row of a large vocabulary has a program of 16 warps. Its threads hold 32 logits in at most 64 registers,
    by the ahead-of-time report for sm_90, so that two programs share a multiprocessor. With fewer logits a
    thread, more programs would share it, and their rows (100 KB at GPT-2's vocabulary) would not stay in the
    L2 cache until the second read. A bias takes as many registers as the logits.
    """
    if v < 4096:
        width = min(2048, max(64, next_power_of_2(v)))
        return Tile(max(1, min(32, 2048 // width)), width, num_warps=4, num_stages=1)
    return Tile(1, min(8192 if bias else 16384, next_power_of_2(v + 1) // 2), num_warps=16, num_stages=1)


LOSS_CHUNK = 2**28 + 2**24  # logits held at once on a GPU: 544 MiB in 16 bits


def loss_chunk_rows(device: torch.device, n: int, c: int, width: int) -> int:
    """Rows of a chunk of logits (n, width), whose weight has `c` columns."""
    if device.type != "cuda":
        return max(16, 2**24 // width // 16 * 16)
    return loss_wave_rows(_multiprocessors(device), n, c, width)


@functools.lru_cache
def loss_wave_rows(multiprocessors: int, n: int, c: int, width: int) -> int:
    """The rows of a chunk of logits (n, width) at which the matmuls of all chunks take the least time.

    A matmul runs in waves of one tile of 128 x 256 on each multiprocessor. The time of a wave is proportional
    to the inner dimension: `c` for the logits, `width` for dx. The tiles of dweight are always the same. A
    last chunk below half the rows is avoided, since each chunk reads and writes all of dweight.
    """
    most = max(128, LOSS_CHUNK // width // 128 * 128)
    if n <= most:
        return n

    def time(rows: int) -> int:
        logits, dx = (-(-rows // 128) * -(-columns // 256) for columns in (width, c))  # tiles
        return -(-logits // multiprocessors) * c + -(-dx // multiprocessors) * width

    def cost(rows: int) -> tuple[bool, int, int]:
        chunks, rest = divmod(n, rows)
        return 0 < rest < rows // 2, chunks * time(rows) + time(rest), -(-n // rows)

    return min(range(128, most + 1, 128), key=cost)


def gelu_tile(f: int) -> Tile:
    """The tile of the kernels between the feed-forward's matmuls, at `f` columns."""
    width = min(512, next_power_of_2(f))
    return Tile(min(32, 2048 // width), width, num_warps=4, num_stages=1)


def gelu_backward_tile(f: int, itemsize: int) -> Tile:
    """The tile of GELU's backward pass: as many bytes in either dtype, and three stages as in LayerNorm's.

    Rows of other than a multiple of 4 bytes cannot be copied asynchronously. Measured on sm_90 only, in
    bfloat16 at 3,072 columns: 95% of the bandwidth of a copy.
    """
    tile = gelu_tile(f)
    rows = max(1, tile.block_m * 2 // itemsize)
    return tile._replace(block_m=rows, num_stages=3 if f * itemsize % 4 == 0 else 1)


def gelu_programs(device: torch.device, n: int, f: int, tile: Tile) -> int:
    """How many programs share the rows of GELU's backward pass, for each block of columns.

    12 warps a multiprocessor, or 20 that do not prefetch, as many as their registers allow.
    """
    warps = 12 if tile.num_stages > 1 else 20
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else 1
    concurrent = multiprocessors * (warps // tile.num_warps)
    return min(-(-n // tile.block_m), max(1, concurrent // -(-f // tile.block_n)))


def gelu_gemm_tile(architecture: int, itemsize: int, m: int, n: int, k: int) -> Tile | None:
    """The tile of the matmul with bias + GELU in its epilogue, where a GPU has shown it to be faster.

    None, which is every call so far: a matmul by torch, then a kernel for bias + GELU.
    """
    return None
