"""Properties of every launch of every op: its device, independent programs, the precision of its matmuls."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels.registry import SPECS
from kernels.spec import Case, OpSpec
from kernels.tuning import Tile
from kernels.verify import run_case

triton, launch = (
    pytest.importorskip(name, reason="triton is not installed") for name in ("triton", "kernels.launch")
)
pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
OPS = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def results_of(spec: OpSpec, **sizes: int) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the op's first case on Triton, with `sizes` in place of its own."""
    case = spec.tagged("small")[0]
    case = Case({name: sizes.get(name, size) for name, size in case.sizes.items()}, case.options)
    inputs = spec.make_inputs(case, torch.float32, CPU, torch.Generator().manual_seed(0))
    with kernels.use_backend(**{spec.name: "triton"}):
        results = run_case(spec.function, inputs, spec.gradients, spec.writes)
    return {name: value for name, value in results.items() if value is not None}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lists the launches that run from now on."""
    recorded: list[Any] = []
    run = launch.Launch.run

    def record_and_run(self: Any) -> None:
        recorded.append(self)
        run(self)

    monkeypatch.setattr(launch.Launch, "run", record_and_run)
    return recorded


@OPS
def test_launches_run_on_the_tensors_device(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is launched on the current device although its tensors are on another."""
    devices: list[torch.device] = []
    launched: list[str] = []
    run = launch.Launch.run

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    def checked(self: Any) -> None:
        assert devices == [CPU], self.kernel.__name__
        launched.append(self.kernel.__name__)
        run(self)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(launch.Launch, "run", checked)
    results_of(spec)
    assert launched


@OPS
def test_no_program_depends_on_another(
    spec: OpSpec, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race: programs that add to the same memory, so that their order changes the bits of the result."""
    sizes = {"N": 70, "C": 48, "I": 600, "V": 300, "T": 40, "Tq": 40, "Tk": 40, "Tmax": 70}
    forwards = results_of(spec, **sizes)
    builder = triton.runtime.interpreter.InterpreterBuilder
    place = builder.set_grid_idx
    monkeypatch.setattr(
        builder,
        "set_grid_idx",
        lambda self, *ids: place(self, *(count - 1 - i for count, i in zip(self.grid_dim, ids, strict=True))),
    )
    backwards = results_of(spec, **sizes)
    for name, value in forwards.items():
        assert torch.equal(value, backwards[name]), name
    programs: dict[str, int] = {}
    for one in launches:
        programs[one.kernel.__name__] = max(programs.get(one.kernel.__name__, 0), *one.grid)
    assert min(programs.values()) > 1, programs


@OPS
def test_float32_matmuls_use_tf32_only_where_torch_allows_it(
    spec: OpSpec, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that uses tf32 where torch does not allow it, or float32 where torch allows tf32."""
    monkeypatch.setattr("kernels.ffn.torch_op.gelu_gemm_tile", lambda *args: Tile(16, 16))
    for setting in ("none", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        try:
            results_of(spec)
            assert launch.precision(torch.bfloat16) == "ieee"
        finally:
            torch.backends.cuda.matmul.fp32_precision = "none"
        precisions = {one.arguments.get("PRECISION") for one in launches} - {None}
        multiplies = spec.family in ("attention", "ffn") or spec.name == "decode_block"
        expected = {"tf32" if setting == "tf32" else "ieee"} if multiplies else set()
        assert precisions == expected
        launches.clear()


def test_every_matmul_names_its_precision() -> None:
    """A `tl.dot` that takes Triton's default for float32, which is tf32."""
    matmuls = 0
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                matmuls += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("input_precision") == "PRECISION", f"{path.name}:{node.lineno}"
    assert matmuls > 0


@OPS
def test_collected_launches_do_not_run(spec: OpSpec, launches: list[Any]) -> None:
    """A collected launch that runs, that holds tensors, or that differs from the one that runs later."""
    with launch.collect() as collected:
        results_of(spec)
    launches.clear()
    ran = results_of(spec)
    assert ran
    for one in filter(lambda one: one.grid[0] > 0, launches):
        assert one._replace(arguments=launch._without_data(one.arguments)) in collected
    assert not any(isinstance(a, torch.Tensor) for one in collected for a in one.arguments.values())


def test_compiling_takes_the_options_of_the_run() -> None:
    """A compilation ahead of the run with other options, or with arguments in a wrong order."""
    calls: list[Any] = []

    class Kernel:
        arg_names = ("x_ptr", "n")

        def warmup(self, *arguments: Any, **options: Any) -> Any:
            calls.append((arguments, options))
            return self

        @property
        def run(self) -> None:
            calls.append("loaded")

    launch.Launch(Kernel(), (3,), {"n": 7, "x_ptr": torch.ones(2)}, Tile(16, 16, 8, 3)).compile()
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert calls == [((torch.float32, 7), {"grid": (3,), **options}), "loaded"]


def test_every_compiler_option_is_explicit() -> None:
    """Fused multiply-adds left to Triton's default, about which 3.9 warns and which 3.10 changes."""
    options: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: options.update(arguments)

    launch.Launch(Kernel(), (1,), {"n": 7}, Tile(16, 16, 8, 3)).run()
    assert options == {"n": 7, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
