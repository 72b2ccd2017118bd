"""The tuning table: the tiles of every architecture, run in the interpreter."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from kernels import tuning
from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tuning import SHARED_MEMORY, AttentionTiles
from kernels.verify import check
from tests.kernels.attention_suite import assert_all_ok

pytestmark = pytest.mark.interpreter


def attention_rows() -> dict[AttentionTiles, dict[str, bool]]:
    """Every row that a GPU takes, also one without its own rows, and the options that the row is for."""
    rows: dict[AttentionTiles, dict[str, bool]] = {}
    choices = itertools.product(
        (*SHARED_MEMORY, 75, 121), (2, 4), (64, 128, 256), (False, True), (False, True)
    )
    for architecture, itemsize, d, dropout, grouped in choices:
        row = tuning.attention_tiles(architecture, itemsize, d, dropout=dropout, grouped=grouped)
        rows.setdefault(row, {"dropout": dropout, "grouped": grouped})
    return rows


@pytest.mark.parametrize(("row", "options"), attention_rows().items(), ids=lambda value: None)
def test_every_row_of_attention_is_right(
    row: AttentionTiles, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong results with the tiles of one row, which no other test runs."""
    from kernels.attention import torch_op

    monkeypatch.setattr(torch_op, "attention_tiles", lambda *args, **kwargs: row)
    sizes = {"B": 1, "H": 1 + options["grouped"], "Hkv": 1, "Tq": 130, "Tk": 131, "D": 16}
    dropout = {"dropout_p": 0.2, "seed": 3} if options["dropout"] else {}
    case = Case(sizes, {"key_start": "documents"} | dropout)
    assert_all_ok(check(SPECS["causal_attention"], case, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("columns", [64, 768, 1600, 4096, 16384])
def test_persistent_programs_fill_a_gpu_exactly(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent programs that leave multiprocessors idle, or more programs than run at the same time."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    device, rows = torch.device("cuda"), 10**6

    for architecture, itemsize in itertools.product(SHARED_MEMORY, (2, 4)):
        tile = tuning.norm_backward_tile(architecture, columns, itemsize, dropout=False)
        programs = tuning.norm_programs(device, rows, columns, tile)
        assert programs * tile.num_warps in (132 * 8, 132 * 12, 132 * 16)
        assert tuning.norm_programs(device, 3, columns, tile) <= 3

        tile = tuning.gelu_backward_tile(columns, itemsize)
        blocks = -(-columns // tile.block_n)
        programs = tuning.gelu_programs(device, rows, columns, tile) * blocks
        assert 0.9 < programs * tile.num_warps / (132 * 12) <= 1


@pytest.mark.parametrize("architecture", [0, 75, *SHARED_MEMORY])
def test_tiles_of_the_norm_backward_fit(architecture: int) -> None:
    """A tile of many rows that spills, or prefetched rows that exceed the shared memory."""
    shared = SHARED_MEMORY.get(architecture, 99)
    for c, itemsize in itertools.product(range(1, tuning.NORM_COLUMNS + 1, 15), (2, 4)):
        rows, width, warps, stages = tuning.norm_backward_tile(architecture, c, itemsize, dropout=False)[:4]
        elements = rows * -(-c // width) * width
        assert elements <= 32 * 32 * warps or warps == 16
        assert width == tuning.norm_tile(c, itemsize).block_n
        assert stages == 1 or (architecture == 0 or (12 * 2 * elements < 1024 * shared and c % 16 == 0))


@pytest.mark.parametrize(("f", "itemsize", "stages"), [(1536, 2, 3), (333, 2, 1), (333, 4, 3), (6400, 2, 3)])
def test_gelu_prefetches_what_can_be_copied(f: int, itemsize: int, stages: int) -> None:
    """Few programs, because they prefetch, where rows of an odd number of bytes cannot be prefetched."""
    tile = tuning.gelu_backward_tile(f, itemsize)
    assert tile.num_stages == stages
    assert tile.block_m * tile.block_n * itemsize <= 4096
    cpu = torch.device("cpu")
    assert tuning.gelu_programs(cpu, 10**6, 256, tile) * tile.num_warps == (12 if stages == 3 else 20)


@pytest.mark.parametrize(
    ("multiprocessors", "n", "c", "rows", "waves"),
    [
        (132, 65536, 768, 5632, 12),  # 13 waves for chunks of 512 MiB
        (132, 32768, 768, 5632, 6),
        (132, 65536, 1600, 4736, 28),
        (108, 65536, 768, 4480, 15),
        (114, 65536, 768, 4736, 14),
        (148, 65536, 768, 5632, 12),
    ],
)
def test_chunks_of_the_loss_fill_whole_waves(
    multiprocessors: int, n: int, c: int, rows: int, waves: int
) -> None:
    """Chunks of a round number of bytes, which leave a part of the multiprocessors idle in each matmul."""
    assert tuning.loss_wave_rows(multiprocessors, n, c, 50304) == rows
    chunks = [rows] * (n // rows) + [n % rows]
    tiles = [-(-chunk // 128) * -(-c // 256) for chunk in chunks]
    assert sum(-(-count // multiprocessors) for count in tiles) == waves


@pytest.mark.parametrize("multiprocessors", [108, 114, 132, 148])
@pytest.mark.parametrize("width", [64, 1024, 32000, 50304, 128256, 2**22])
def test_chunks_of_the_loss_are_bounded_and_even(multiprocessors: int, width: int) -> None:
    """A chunk beyond the limit of memory, or a last chunk so small that it mostly rereads dweight."""
    limit = max(128, tuning.LOSS_CHUNK // width)
    for n in (1, 127, 5000, 5633, 65536, 300001):
        rows = tuning.loss_wave_rows(multiprocessors, n, 768, width)
        assert 1 <= rows <= limit
        assert rows == n <= limit or rows % 128 == 0
        assert width > 128256 or not 0 < n % rows < rows // 2


@pytest.mark.parametrize("keys", [1024, 32768])
@pytest.mark.parametrize("programs", [1, 12, 96, 5000])
def test_parts_of_the_keys_fill_a_gpu(programs: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the keys that leave a GPU idle, or more of them than the joining program reads at once."""
    monkeypatch.setattr(tuning, "_multiprocessors", lambda device: 132)
    tile = tuning.attention_decode_tile(90, 2, 64, keys)
    parts = tuning.attention_decode_splits(torch.device("cuda"), programs, keys, tile)
    most, warps = min(16 * tile.num_warps, keys // tile.block_n), programs * tile.num_warps
    assert parts == most or parts * warps >= 8 * 132
    assert parts == 1 or (parts <= most and (parts - 1) * warps < 8 * 132)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("n", "k"),
    [(2304, 768), (768, 768), (768, 3072), (50257, 768), (50257, 1600), (1, 1), (40, 16384), (4800, 1600)],
)
def test_decoding_reads_its_weights_at_once(n: int, k: int, itemsize: int, batch: int) -> None:
    """A tile whose program reads a part of its weights only after the rest, or that idles multiprocessors."""
    tile = tuning.decode_linear_tile(90, itemsize, n, k, batch)
    per_row = tile.block_n * itemsize // 512
    rows = max(1, min(tile.block_m, tile.num_warps // per_row))
    most = 12 if per_row == batch == 1 else 8
    assert -(-tile.block_m // rows) * -(-k // tile.block_n) <= most
    assert tile.block_m == 1 or n // tile.block_m >= 132
    assert per_row <= tile.num_warps <= 16


@pytest.mark.parametrize("architecture", [0, 75, *SHARED_MEMORY, 121])
def test_only_new_gpus_start_a_kernel_early(architecture: int) -> None:
    """A launch that a GPU before sm_90 rejects, or a kernel of a token that alone waits for its launch."""
    tiles = (
        tuning.decode_embedding_tile(architecture, 768),
        tuning.decode_argmax_tile(architecture, 4, 50257),
        tuning.decode_linear_tile(architecture, 2, 2304, 768, 1),
        tuning.attention_decode_tile(architecture, 2, 64, 1024),
        tuning.attention_decode_tile(architecture, 2, 64, 4096),
    )
    assert {tile.pdl for tile in tiles} == {architecture >= 90}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"B": 2, "C": 40, "V": 1100}, {"B": 1, "C": 2100, "V": 9}])
def test_decodings_tiles_of_a_gpu_are_right(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong results with several warps for each row, or several rows for each program."""
    from kernels.decode import torch_op

    def tile(architecture: int, *sizes: int) -> tuning.Tile:
        return tuning.decode_linear_tile(90, *sizes)._replace(pdl=False)  # unknown to the interpreter

    monkeypatch.setattr(torch_op, "decode_linear_tile", tile)
    assert_all_ok(check(SPECS["decode_head"], Case(sizes), torch.float32, torch.device("cpu")))
