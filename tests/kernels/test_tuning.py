"""The table of tiles: what an architecture that is not here would run, interpreted."""

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

pytestmark = pytest.mark.interpreter


def attention_rows() -> dict[AttentionTiles, dict[str, bool]]:
    """Every row that some GPU takes, one without rows of its own included, and what it is for."""
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
    """A row that only GPUs with little shared memory take, whose tiles no test ever runs."""
    from kernels.attention import torch_op

    monkeypatch.setattr(torch_op, "attention_tiles", lambda *args, **kwargs: row)
    sizes = {"B": 1, "H": 1 + options["grouped"], "Hkv": 1, "Tq": 130, "Tk": 131, "D": 16}
    case = Case(
        sizes, {"key_start": "documents"} | ({"dropout_p": 0.2, "seed": 3} if options["dropout"] else {})
    )
    verdicts = check(SPECS["causal_attention"], case, torch.float32, torch.device("cpu"))
    assert all(verdict.ok for verdict in verdicts), [str(verdict) for verdict in verdicts]


@pytest.mark.parametrize("columns", [64, 768, 1600, 4096, 16384])
def test_a_gpu_is_full_and_no_program_waits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent programs that leave multiprocessors idle, or more of them than run at once."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    device, rows = torch.device("cuda"), 10**6
    warps, registers = tuning.norm_tile(columns).num_warps, tuning.norm_registers(columns)
    taken = 32 * warps * registers
    programs = tuning.norm_programs(device, rows, columns)
    assert programs == 132 or programs * taken <= 132 * tuning.REGISTERS < (programs + 132) * taken
    tile = tuning.gelu_tile(columns)
    programs = tuning.gelu_programs(device, rows, columns) * -(-columns // tile.block_n)
    assert 0.8 < programs * 32 * tile.num_warps * tuning.GELU_REGISTERS / (132 * tuning.REGISTERS) <= 1
    assert tuning.norm_programs(device, 3, columns) <= 3
