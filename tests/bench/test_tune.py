"""The search for tiles: it finds the best one, rejects wrong ones, and restores the tuning table."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import pytest
import torch

import bench.tune
from bench.candidates import FORMS, forms
from bench.cases import Race
from bench.contestants import OURS, Contestant
from bench.engine import Admission, Bench, Runner
from bench.measure import Ceilings, Clock, Timing
from bench.tune import Query, knobs, neighbours, queries, search, substituted, with_answer
from gpt.cli import run_command
from kernels import tuning
from kernels.registry import SPECS
from kernels.tuning import Tile
from kernels.verify import Oracle


class Pair(NamedTuple):
    """The tiles of two kernels; the second kernel has none yet."""

    first: Tile
    second: Tile | None


NORM = SPECS["layer_norm"]
RACE = Race(NORM, NORM.tagged("small")[0])
BEST = Tile(128, 64, 8, 3)


def runner() -> Runner:
    clock = Clock(torch.device("cpu"))
    return Runner(Bench("norm"), clock, Ceilings(clock), torch.float32, seconds=0.0, compiled=False)


def asked(contestant: Contestant) -> Tile:
    with contestant.context():
        return tuning.norm_tile(17)


def cost(tile: Tile) -> float:
    return 1e-3 * (1 + sum(abs(math.log2(a / b)) for a, b in zip(tile[:4], BEST[:4], strict=True)))


@pytest.fixture
def landscape(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake kernel, slower the further its tile is from BEST; tiles in "wrong" give wrong results."""
    state: dict[str, Any] = {"wrong": set(), "reference": 1.0, "seen": []}

    def admit(self: Runner, spec: Any, contestant: Contestant, inputs: Any, oracle: Any) -> Admission:
        state["seen"].append(asked(contestant))
        return Admission("wrong" if asked(contestant) in state["wrong"] else "measured")

    def interleave(lanes: dict[str, Any], *_: Any) -> dict[str, Timing]:
        times = {}
        for name, lane in lanes.items():
            with lane.context():
                here = state["reference"] if name == "reference" else cost(tuning.norm_tile(17))
            times[name] = Timing(here, here, here, 5)
        return times

    monkeypatch.setattr(bench.tune, "shared", lambda spec, compiled: [_plain(OURS), _plain("reference")])
    monkeypatch.setattr(Runner, "admit", admit)
    monkeypatch.setattr(bench.tune, "interleave", interleave)
    monkeypatch.setattr(bench.tune, "queries", lambda *_: {Query("norm_tile", (17,)): Tile(32, 16, 4, 1)})
    return state


def _plain(name: str) -> Contestant:
    return Contestant(name, NORM.reference, peer=False)


def climb(seconds: float = 60) -> bench.tune.Finding:
    (finding,) = search(runner(), RACE, time.monotonic() + seconds)
    return finding


def test_the_best_tile_is_found(landscape: dict[str, Any]) -> None:
    """A search that stops too early, reports the wrong tile, or attributes a time to the wrong tile."""
    finding = climb()
    assert finding.query == "norm_tile(17)"
    assert str(Query("tiles", (90, 2), (("dropout", True),))) == "tiles(90, 2, dropout=True)"
    assert (finding.before, finding.after) == ("Tile(32, 16, 4, 1)", "Tile(128, 64, 8, 3)")
    assert finding.seconds_after == pytest.approx(1e-3)
    assert finding.seconds_before == pytest.approx(cost(Tile(32, 16, 4, 1)))
    assert "REFERENCE" not in str(finding)


def test_the_best_listed_forms_are_combined(
    landscape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that is never tried, or the best form of one kernel lost when the next kernel's are compared."""
    listed = [[{"block_m": 64}, {"block_m": 128}], [{"block_n": 16}], [{"num_warps": 2}, {"num_warps": 8}]]
    monkeypatch.setattr(bench.tune.candidates, "forms", lambda *_: list(listed))
    monkeypatch.setattr(bench.tune, "neighbours", lambda _: [])
    assert climb().after == "Tile(128, 16, 8, 1)"


@pytest.mark.parametrize("architecture", FORMS)
def test_the_present_tiles_are_listed(architecture: int) -> None:
    """A list that the present tiles are not compared with, or that another head dimension or dtype gets."""
    for d, kernels in FORMS[architecture].items():
        tiles = tuning.attention_tiles(architecture, 2, d, dropout=False, grouped=False)
        assert all(getattr(tiles, kernel) in forms for kernel, forms in kernels.items())
        changes = forms("attention_tiles", (architecture, 2, d), {"dropout": False, "grouped": False})
        assert [[*change.items()] for group in changes for change in group] == [
            [(kernel, tile)] for kernel, tiles in kernels.items() for tile in tiles
        ]
        assert not forms("attention_tiles", (architecture, 4, d), {"dropout": False, "grouped": False})
        assert not forms("attention_tiles", (architecture, 2, d), {"dropout": True, "grouped": False})
    assert not forms("norm_tile", (768,), {})
    pdl = [[{"pdl": False}]] if architecture >= 90 else []  # older GPUs never start a kernel early
    assert forms("decode_linear_tile", (architecture, 2, 2304, 768, 1), {}) == pdl
    assert forms("attention_decode_tile", (architecture, 2, 64, 1024), {}) == pdl


def test_a_wrong_tile_is_never_taken(landscape: dict[str, Any]) -> None:
    """The fastest tile wins although its results are wrong."""
    landscape["wrong"] = {BEST}
    finding = climb()
    assert finding.after != "Tile(128, 64, 8, 3)"
    assert finding.rejected >= 1


def test_a_faster_reference_is_reported(landscape: dict[str, Any]) -> None:
    """A row for `tuning.SLOWER` that would make "auto" choose the slower backend."""
    landscape["reference"] = 1e-4
    finding = climb()
    assert f"the REFERENCE is faster, 100 µs: {finding.slower}" in str(finding)
    row = eval(finding.slower, {"Slower": tuning.Slower, "torch": torch})
    assert row == tuning.Slower(
        0, "layer_norm", torch.float32, {n: (size, size) for n, size in RACE.case.sizes.items()}
    )


def test_the_search_keeps_to_its_time(landscape: dict[str, Any]) -> None:
    """A search that continues after its deadline."""
    finding = climb(seconds=-1)
    assert finding.before == finding.after
    assert len(landscape["seen"]) == 1


def test_a_candidate_applies_to_one_query(landscape: dict[str, Any]) -> None:
    """A candidate for one shape used for other shapes, or left in the tuning table."""
    before = tuning.norm_tile
    with with_answer(_plain(OURS), Query("norm_tile", (17,)), BEST).context():
        assert tuning.norm_tile(17) == BEST
        assert tuning.norm_tile(768) == before(768) != BEST
    assert tuning.norm_tile is before
    with pytest.raises(KeyError), substituted("norm_tile", lambda c: BEST):
        raise KeyError
    assert tuning.norm_tile is before


def test_neighbours_differ_in_one_value() -> None:
    """A move that changes two values or exceeds a limit; a tile in a tuple that is never changed."""
    tile = Tile(64, 32, 4, 2)
    assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in neighbours(tile))
    assert len(set(neighbours(tile))) == 8
    assert Tile(64, 32, 4, 0) not in neighbours(Tile(64, 32, 4, 1))
    assert neighbours(None) == list(bench.tune.STARTS)
    tiles = Pair(tile, None)
    moved = neighbours(tiles)
    assert {
        name for other in moved for name in tiles._fields if getattr(other, name) != getattr(tiles, name)
    } == set(tiles._fields)


@pytest.mark.interpreter
def test_the_queries_of_an_op_are_recorded() -> None:
    """A function of the tuning table that the search never changes."""
    assert {"norm_tile", "attention_tiles", "loss_tile", "gelu_tile"} <= set(knobs())
    assert not [name for name in knobs() if name.startswith("_")]
    ours = Contestant(
        OURS, NORM.function, lambda: bench.contestants.kernels.use_backend("triton"), peer=False
    )
    inputs = NORM.make_inputs(RACE.case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    asked_queries = queries(runner(), RACE, ours, inputs, Oracle(NORM, inputs, torch.float32))
    assert asked_queries == {
        Query("norm_tile", (17, 4)): tuning.norm_tile(17, 4),
        Query("norm_backward_tile", (0, 17, 4), (("dropout", False),)): tuning.norm_backward_tile(
            0, 17, 4, dropout=False
        ),
    }


def test_without_a_gpu_there_is_nothing_to_tune(capsys: pytest.CaptureFixture[str]) -> None:
    """A search on a CPU, or a traceback."""
    assert run_command("bench.tune", bench.tune.main, ["--device", "cpu", "--quick"]) == 0
    assert "no GPU was found" in capsys.readouterr().out
    for arguments in (["--op", "layer_nrm"], ["--budget", "soon"], ["--quik"]):
        assert run_command("bench.tune", bench.tune.main, arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
