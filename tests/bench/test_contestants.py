"""The contestants: peers that are called as their package defines, and deterministic forms of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bench.engine
import bench.loss
import bench.measure
from bench import attention, command
from bench.cases import Race
from bench.contestants import DETERMINISTIC, OURS, Contestant, ours, padded_vocabulary
from bench.engine import Bench, Runner, find_bench
from bench.measure import Ceilings, Clock
from bench.plot import ratios
from bench.record import Row
from kernels import dispatch
from kernels.registry import SPECS
from kernels.spec import Case
from tests.bench.reports import measured

ATTENTION, LOSS = SPECS["causal_attention"], SPECS["linear_cross_entropy"]
SQUARE = Case({"B": 1, "H": 2, "Tq": 24, "Tk": 24, "D": 16})
ODD = Case({"N": 9, "C": 16, "V": 33})
FLAG = torch.are_deterministic_algorithms_enabled


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.measure, "MIN_SAMPLES", 1)
    monkeypatch.setattr(bench.measure, "MAX_SETS", 1)
    monkeypatch.setattr(dispatch, "interpreting", False)


def run(family: str, case: Case, *names: str) -> dict[str, Row]:
    """The row of each named contestant: forward and backward together, or the reason for none."""
    clock = Clock(torch.device("cpu"))
    clock.sample_seconds = 0.0
    ceilings = Ceilings(clock, 0.0)
    ceilings._copy = 1e9
    its_bench = replace(find_bench(family), matmul=lambda spec, case: None)
    runner = Runner(
        bench=its_bench,
        clock=clock,
        ceilings=ceilings,
        dtype=torch.float32,
        seconds=0.0,
        compiled=False,
        names=names,
    )
    rows = list(runner.run(Race(its_bench.specs[0], case)))
    return {row.contestant: row for row in reversed(rows)}


def flash_attention(module: str, monkeypatch: pytest.MonkeyPatch, causal: bool = True) -> list[bool]:
    """Installs a fake FlashAttention package; returns the `deterministic` of each later call."""
    calls: list[bool] = []

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> tuple[torch.Tensor, None]:
        calls.append(deterministic)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), None

    fake: Any = ModuleType(module)
    fake.flash_attn_func = flash_attn_func
    if not causal:
        fake.flash_attn_func = lambda q, k, v, **o: flash_attn_func(q, k, v, **{**o, "causal": False})
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.mark.parametrize(("name", "module"), attention.FLASH_ATTN.items())
def test_flash_attention_is_called_as_it_is_defined(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transposed layout, a lost mask, or a deterministic row that times the other backward pass."""
    calls = flash_attention(module, monkeypatch)
    for contestant, flag in ((name, False), (name + DETERMINISTIC, True)):
        calls.clear()
        rows = run("attention", SQUARE, contestant)
        assert [row.status for row in rows.values()] == ["measured"], rows
        assert set(calls) == {flag}
    flash_attention(module, monkeypatch, causal=False)
    assert {row.status for row in run("attention", SQUARE, name, name + DETERMINISTIC).values()} == {"wrong"}


def test_flash_attention_4_is_imported_by_its_public_name() -> None:
    """A module that the distribution flash-attn-4 documents nowhere."""
    assert attention.FLASH_ATTN["flash-attn 4"] == "flash_attn.cute"
    names = [c.name for c in attention.peers(ATTENTION, True)]
    absent = {c.name: c.absent for c in attention.peers(ATTENTION, True) if c.function is None}
    for name in attention.FLASH_ATTN:
        assert {name, name + DETERMINISTIC} <= set(names)
        if name in absent:
            assert absent[name] == absent[name + DETERMINISTIC] == "not installed"


def test_deterministic_sdpa_sets_the_flag_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deterministic row timed without torch's flag, with its fills, or a flag left set for the others."""
    settings: Any = torch.utils.deterministic
    seen: dict[str, list[tuple[bool, bool]]] = {}
    original = attention.sdpa

    def record(_: object = None) -> None:
        seen.setdefault(names[0], []).append((FLAG(), settings.fill_uninitialized_memory))

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        record()
        out = original(*arguments, **options)
        out.register_hook(record)  # runs in the backward pass
        return out

    monkeypatch.setattr(attention, "sdpa", spy)
    for name, flags in (("SDPA flash", (False, True)), ("SDPA flash" + DETERMINISTIC, (True, False))):
        names = [name]
        assert run("attention", SQUARE, name)[name].status == "measured"
        assert len(seen[name]) > 2
        assert set(seen[name]) == {flags}
        assert (FLAG(), settings.fill_uninitialized_memory) == (False, True)

    (refuses,) = (c for c in attention.peers(ATTENTION, False) if c.name == "SDPA cudnn" + DETERMINISTIC)
    with pytest.raises(RuntimeError, match="as torch without a deterministic form"), refuses.context():
        raise RuntimeError("as torch without a deterministic form")
    assert (FLAG(), settings.fill_uninitialized_memory) == (False, True)


def test_our_deterministic_form_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deterministic row that runs our default form, is not judged as ours, or hides a wrong result."""
    seen: list[Any] = []

    def function(**inputs: Any) -> torch.Tensor:
        seen.append(inputs.pop("deterministic", None))
        return ATTENTION.reference(**inputs)

    spec = replace(ATTENTION, function=function)
    default, deterministic = ours(spec), ours(spec, deterministic=True)
    assert (default.name, deterministic.name) == (OURS, f"{OURS}, deterministic")
    assert not default.peer
    assert not deterministic.peer
    inputs = ATTENTION.make_inputs(SQUARE, torch.float32, torch.device("cpu"), torch.Generator())
    for contestant, expected in ((default, None), (deterministic, True)):
        assert contestant.function is not None
        contestant.function(**inputs)
        assert seen.pop() is expected
    names = [c.name for c in attention.peers(ATTENTION, False)]
    assert names.count(f"{OURS}, deterministic") == 1
    assert not any(DETERMINISTIC in c.name for c in attention.peers(SPECS["decode_attention"], False))

    race = measured("causal_attention", "B1", "backward", contestant=OURS, seconds=1.0)
    rows = [race, replace(race, contestant=deterministic.name, seconds=2.0)]
    assert ratios([*rows, replace(race, contestant="SDPA flash", seconds=3.0)]) == [("SDPA flash", 3.0)]


def test_a_wrong_deterministic_form_fails_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 although the deterministic form of our op has a wrong result."""
    wrong = Contestant(OURS + DETERMINISTIC, lambda **inputs: inputs["q"] * 1.5, peer=False)
    toy = Bench("attention", lambda spec, compiled: [wrong])
    monkeypatch.setattr(Bench, "specs", property(lambda self: [ATTENTION]))
    monkeypatch.setattr(command, "plan", lambda specs, targets, **_: [Race(ATTENTION, SQUARE)])
    monkeypatch.setattr(bench.engine, "shared", lambda spec, compiled: [])
    assert command.command(toy, ["--device", "cpu", "--quick"]) == 1


def loss_rows(monkeypatch: pytest.MonkeyPatch, case: Case) -> dict[str, Row]:
    monkeypatch.setattr(bench.loss, "compile_of", lambda name, function, included: Contestant(name, function))
    names = [c.name for c in bench.loss.peers(LOSS, True)]
    return run("loss", case, *names)


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
def test_padded_logits_are_the_same_loss(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded column that takes probability, or a gradient of another size than the weight's."""
    for v in (33, 64, 65):
        rows = loss_rows(monkeypatch, replace(ODD, sizes={"N": 9, "C": 16, "V": v}, options=options))
        for name in ("whole logits", "whole logits, compiled", "whole logits, padded, compiled"):
            assert rows[name].status == "measured", rows[name]
    assert [padded_vocabulary(v) for v in (1, 64, 65, 50257)] == [64, 64, 128, 50304]


def test_padded_logits_have_an_aligned_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline said to be padded whose matmul has the odd size."""
    widths = []
    original = F.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        widths.append(weight.shape[0])
        return original(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    x, weight, targets = torch.randn(3, 4), torch.randn(33, 4), torch.tensor([0, 32, 5])
    bench.loss.padded_logits(x, weight, targets, None)
    bench.loss.whole_logits(x, weight, targets, None)
    assert widths == [64, 33]


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
def test_the_chunked_loss_of_torch_is_a_contestant(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's op left out where it exists, called with all logits in memory, or without the bias."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch before 2.13 has no F.linear_cross_entropy")
    original: Callable[..., Any] = F.linear_cross_entropy
    given = []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        given.append(keywords["options"])
        return original(*arguments, **keywords)

    monkeypatch.setattr(F, "linear_cross_entropy", spy)
    row = loss_rows(monkeypatch, replace(ODD, options=options))["F.linear_cross_entropy"]
    assert row.status == "measured", row
    assert given
    assert all(isinstance(each, torch.nn.LinearCrossEntropyOptions) for each in given)


def test_an_older_torch_has_no_chunked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, or no reason, where torch is too old."""
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    row = loss_rows(monkeypatch, ODD)["F.linear_cross_entropy"]
    assert (row.status, row.reason) == ("absent", f"torch {torch.__version__} has none, torch 2.13 is needed")
