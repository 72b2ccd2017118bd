"""The engine: a wrong contestant is not timed, and every contestant has a row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.engine
import bench.machine
from bench.cases import Race, fit, plan
from bench.contestants import COMPILED, OURS, Contestant, Unsupported, only, optional
from bench.engine import Bench, Runner, find_bench, lane
from bench.measure import Ceilings, Clock, Lane, capture
from bench.record import Row
from bench.table import race
from bench.targets import Target
from kernels import dispatch
from kernels.registry import SPECS
from kernels.spec import Case

CPU = torch.device("cpu")
NORM = SPECS["layer_norm"]
EPS = torch.finfo(torch.float32).eps
RACE = Race(NORM, Case({"N": 6, "C": 40}))


class Wrong(torch.autograd.Function):
    """An identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def planted(forward: float = 1.0, gradient: float = 1.0) -> Any:
    """LayerNorm with its output and its gradients multiplied by factors."""

    def function(**inputs: Any) -> torch.Tensor:
        return Wrong.apply(NORM.reference(**inputs), gradient) * forward

    return function


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.measure, "MIN_SAMPLES", 1)
    monkeypatch.setattr(bench.measure, "MAX_SETS", 2)
    monkeypatch.setattr(dispatch, "interpreting", False)


def runner(*peers: Contestant, names: tuple[str, ...] = ()) -> Runner:
    clock = Clock(CPU)
    clock.sample_seconds = 0.0
    ceilings = Ceilings(clock, 0.0)
    ceilings._copy = 1e9
    return Runner(
        bench=Bench("norm", lambda spec, compiled: list(peers)),
        clock=clock,
        ceilings=ceilings,
        dtype=torch.float32,
        seconds=0.0,
        compiled=False,
        names=names,
    )


def rows_of(name: str, *peers: Contestant) -> list[Row]:
    return [row for row in runner(*peers).run(RACE) if row.contestant == name]


@pytest.mark.parametrize(
    "function",
    [
        planted(forward=1 + 12 * EPS),
        planted(forward=1.001),
        planted(gradient=1.001),
        planted(forward=float("nan")),
    ],
)
def test_a_wrong_kernel_is_not_timed(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time for a kernel with a wrong output, or with only a wrong gradient."""
    shared = [Contestant(OURS, function, peer=False), Contestant("reference", NORM.reference, peer=False)]
    monkeypatch.setattr(bench.engine, "shared", lambda spec, compiled: shared)
    (row,) = rows_of(OURS)
    assert (row.status, row.seconds) == ("wrong", None)
    assert row.error is not None
    assert not row.error <= 1
    assert "FAILED" in row.reason
    assert {row.status for row in rows_of("reference")} == {"measured"}


def test_a_peer_is_shown_with_its_error() -> None:
    """A peer that rounds differently is dropped, or a peer with wrong results is timed."""
    close, far = Contestant("close", planted(forward=1 + 12 * EPS)), Contestant("far", planted(forward=1.01))
    rows = rows_of("close", close)
    assert [row.direction for row in rows] == ["both", "forward", "backward"]
    assert all(row.status == "measured" and row.error is not None and row.error > 1 for row in rows)
    assert [row.status for row in rows_of("far", far)] == ["wrong"]


def test_a_contestant_that_cannot_run_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback or no reason; a failure of this package reported as "unavailable"."""

    def fails(**_: Any) -> None:
        raise Unsupported("has no such thing. And more")

    def exhausts(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (ours,) = rows_of(OURS)
    assert ours.status == "unavailable"
    assert "need TRITON_INTERPRET=1" in ours.reason
    assert [(r.status, r.reason) for r in rows_of("p", Contestant("p", fails))] == [
        ("unavailable", "has no such thing")
    ]
    assert [(r.status, r.reason) for r in rows_of("p", Contestant("p", exhausts))] == [
        ("failed", "out of memory")
    ]
    absent = Contestant("p", None, absent="not installed")
    assert [(r.status, r.reason) for r in rows_of("p", absent)] == [("absent", "not installed")]
    monkeypatch.setattr(bench.engine, "shared", lambda spec, compiled: [Contestant(OURS, fails, peer=False)])
    assert rows_of(OURS)[0].status == "failed"


def test_rows_carry_the_work_of_their_direction() -> None:
    """The operations, bytes or limit of one direction shown for another."""
    rows = {row.direction: row for row in rows_of("reference")}
    for direction, parts in (
        ("forward", ["forward"]),
        ("backward", ["backward"]),
        ("both", ["forward", "backward"]),
    ):
        row = rows[direction]
        assert row.flops == sum(NORM.flops(RACE.case, part) for part in parts)
        assert row.bytes == sum(NORM.bytes(RACE.case, torch.float32, part) for part in parts)
        assert row.limit == pytest.approx(row.bytes / 1e9)
        assert row.low is not None
        assert row.seconds is not None
        assert row.low <= row.seconds


def test_an_op_without_gradients_has_only_a_forward() -> None:
    """A backward pass timed for decode_attention, which has none."""
    spec = SPECS["decode_attention"]
    rows = list(runner(names=("reference",)).run(Race(spec, spec.tagged("small")[0])))
    assert [(row.direction, row.status) for row in rows] == [("forward", "measured")]


def test_contestants_that_do_not_fit_together_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contestant that runs out of memory removes the times of the others."""
    here = runner()

    def full(lanes: dict[str, Lane], *_: Any) -> Any:
        if len(lanes) > 1 or "big" in lanes:
            raise torch.OutOfMemoryError
        return dict.fromkeys(lanes, "a time")

    monkeypatch.setattr(bench.engine, "interleave", full)
    assert here._time({"a": Lane([]), "big": Lane([]), "c": Lane([])}) == {"a": "a time", "c": "a time"}


def backward_lane() -> tuple[Lane, Callable[[], object]]:
    """The eager backward pass of RACE, and the call that prepares a sample of it."""
    inputs = runner().input_sets(NORM, RACE.case)
    backward = lane(NORM, Contestant("reference", NORM.reference), inputs, "backward")
    assert backward.prepare is not None
    return backward, backward.prepare


def test_backward_builds_a_graph_for_each_sample() -> None:
    """An autograd graph that only the first sample has, or that is never freed."""
    backward, prepare = backward_lane()
    for _ in range(2):
        prepare()
        for call in backward.calls:
            call()
    with pytest.raises(IndexError):
        [call() for call in backward.calls for _ in range(2)][-1]


def test_graphs_of_an_interrupted_sample_are_freed() -> None:
    """The graphs of a sample that ran out of memory are kept, so that later samples have less memory."""
    backward, prepare = backward_lane()
    prepare()
    prepare()
    backward.calls[0]()
    with pytest.raises(IndexError):
        backward.calls[0]()


def test_sources_outside_git_have_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results without a commit from a machine that has the sources but not the git repository."""
    monkeypatch.setattr(bench.machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert bench.machine.commit() == "unknown"
    monkeypatch.setenv("FUSED_GPT_COMMIT", "0123456789ab")
    assert bench.machine.commit() == "0123456789ab"


def test_the_chunked_loss_is_not_compiled() -> None:
    """torch.compile unrolls a loop over a hundred chunks for minutes, and other cases get no time."""
    clock = Clock(CPU)
    here = Runner(find_bench("loss"), clock, Ceilings(clock), dtype=torch.float32, seconds=0.0)
    contestants = {c.name: c for c in here.contestants(SPECS["linear_cross_entropy"])}
    assert contestants[COMPILED].function is None
    assert "whole logits are compiled instead" in contestants[COMPILED].absent
    assert contestants["whole logits, compiled"].function is not None


def test_sets_of_inputs_differ_and_none_is_zero() -> None:
    """The same values in every set; zeros, for which a matmul is faster."""
    first, second = runner().input_sets(NORM, RACE.case)
    assert not torch.equal(first["x"], second["x"])
    assert first["x"].count_nonzero() == first["x"].numel()


def test_arguments_that_a_peer_lacks_are_refused() -> None:
    """A peer timed without an option of the case, such as dropout."""
    call = only(lambda q: q, ("q",))
    assert call(q=1, key_start=None, dropout_p=0.0) == 1
    with pytest.raises(Unsupported, match="has no dropout_p"):
        call(q=1, dropout_p=0.5)


def test_absent_peers_are_named() -> None:
    """A peer whose import fails stops the bench, or is missing in the table."""

    def missing() -> Any:
        raise ModuleNotFoundError

    def broken() -> Any:
        raise OSError("libsomething.so: cannot open. Really")

    assert optional("p", missing).absent == "not installed"
    assert optional("p", broken).absent == "its import failed: libsomething.so: cannot open"


@pytest.mark.parametrize("family", sorted({spec.family for spec in SPECS.values()}))
def test_every_family_has_a_bench(family: str) -> None:
    """An op that `python -m bench` does not time."""
    its_bench = find_bench(family)
    assert its_bench.family == family
    for spec in its_bench.specs:
        names = [c.name for c in its_bench.peers(spec, False)]
        assert len(set(names)) == len(names)
        for case in spec.tagged("bench"):
            sizes = its_bench.matmul(spec, case)
            assert sizes is None or all(size > 0 for size in sizes)
    assert find_bench("an op family without a file").specs == []


def test_cases_are_made_smaller_for_a_cpu() -> None:
    """A CPU gets a GPU's case; after halving, Hkv does not divide H, or there are more queries than keys."""
    for spec in SPECS.values():
        for case in spec.tagged("bench"):
            cut = fit(spec, case, 10**9)
            assert spec.flops(cut, "forward") + spec.flops(cut, "backward") <= 10**9
            assert cut["D"] == case["D"] if "D" in case.sizes else True
            assert all(size >= 1 for size in cut.sizes.values())
    grouped = Case({"B": 4, "H": 12, "Hkv": 4, "Tq": 512, "Tk": 1024, "D": 64})
    cut = fit(SPECS["causal_attention"], grouped, 10**7)
    assert cut["H"] % cut["Hkv"] == 0
    assert cut["Tq"] <= cut["Tk"] < 1024


def test_the_targeted_cases_come_first() -> None:
    """A budget that drops the cases of the targets before other cases."""
    target = Target("t", "layer_norm", "forward", "share", {"C": 4096})
    races = plan([NORM, SPECS["gelu_ffn"]], [target], on_gpu=True, quick=False)
    assert races[0].case["C"] == 4096
    assert [race.spec.name for race in races[1:5]] == ["layer_norm", "gelu_ffn", "layer_norm", "gelu_ffn"]
    assert len(races) == len(NORM.tagged("bench")) + len(SPECS["gelu_ffn"].tagged("bench"))
    assert [race.spec.name for race in plan([NORM, SPECS["gelu_ffn"]], [], on_gpu=False, quick=True)] == [
        "layer_norm",
        "gelu_ffn",
    ]
    everything = plan(SPECS.values(), [], on_gpu=False, quick=False)
    assert len({(race.spec.name, race.case.id) for race in everything}) == len(everything)


class FakeGraph:
    """A CUDA graph whose replay does nothing."""

    def replay(self) -> None:
        pass


def test_the_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without graph times or memory; a contestant that cannot be captured counted as failed."""
    allocated = iter(range(0, 10**6, 1000))
    fakes = {
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, pool, stream: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "set_stream": lambda stream: None,
        "default_stream": lambda device: None,
        "current_device": lambda: 0,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: next(allocated),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, raising=False)
    captured: list[int] = []

    def synchronises(**inputs: Any) -> torch.Tensor:
        if captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        return NORM.reference(**inputs)

    def capturing(lane: Lane, clock: Clock) -> Lane:
        captured.append(1)
        try:
            return capture(lane, clock)
        finally:
            captured.clear()

    monkeypatch.setattr(bench.engine, "capture", capturing)
    here = runner(Contestant("synchronises", synchronises), names=("reference", "synchronises"))
    here.clock.on_gpu = True
    monkeypatch.setattr(Clock, "time", lambda self, calls, rounds=1: [call() for call in calls] and 1.0)
    rows = list(here.run(RACE))
    assert [(row.contestant, row.direction) for row in rows] == [
        (name, direction)
        for direction in ("both", "forward", "backward")
        for name in ("reference", "synchronises")
    ]
    assert all(row.status == "measured" and row.memory is not None for row in rows)
    assert [row.graph_seconds is not None for row in rows] == [True, False, True, False, True, True]
    refused = "no CUDA graph: operation not permitted when stream is capturing"
    assert [row.reason for row in rows] == ["" if row.graph_seconds is not None else refused for row in rows]
    assert race(rows).count(f"  synchronises: {refused}") == 1
    kept = next(row for row in rows if row.direction == "forward")
    assert kept.memory == 1000 - 6 * 40 * 4
