"""The choice of a backend: precedence, the reasons, and requests that cannot be honoured."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from kernels import dispatch, tuning
from kernels.registry import SPECS
from kernels.spec import OpSpec

OP = dispatch._ops["layer_norm"]
X, W = torch.randn(3, 8), torch.ones(8)


@pytest.fixture(autouse=True)
def interpreter_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_version", (3, 7))
    monkeypatch.setattr(dispatch, "interpreting", True)
    monkeypatch.setattr(dispatch, "environment", "auto")


def a_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, hip: str | None = None) -> SimpleNamespace:
    """A fake tensor on such a GPU, with the attributes that the dispatcher reads."""
    monkeypatch.setattr(dispatch, "interpreting", False)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=minor)
    )
    monkeypatch.setattr(torch.version, "hip", hip)
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


def backend() -> str:
    return OP.choose(X).backend


def test_stronger_settings_win() -> None:
    """A weaker setting that overrides a stronger one, or a setting that remains after its block."""
    assert backend() == "reference"
    with kernels.model_backend("triton"):
        assert backend() == "triton"
        with kernels.use_backend("reference"):
            assert backend() == "reference"
            with kernels.use_backend(layer_norm="triton"):
                assert backend() == "triton"
            with kernels.use_backend(norm="triton"):
                assert backend() == "triton"
                with kernels.use_backend(layer_norm="reference"):
                    assert backend() == "reference"
            assert backend() == "reference"
        with kernels.use_backend(attention="reference"):
            assert backend() == "triton"
    assert backend() == "reference"


@pytest.mark.parametrize(
    ("use_triton", "choice"),
    [
        (True, ("triton", "use_triton=True")),
        (False, ("reference", "use_triton=False")),
        ("auto", ("reference", "auto: on a CPU the interpreter only serves tests")),
    ],
)
def test_a_model_passes_its_use_triton(use_triton: bool | str, choice: tuple[str, str]) -> None:
    """A model's use_triton that selects another backend, or a reason that does not name it."""
    with kernels.model_backend(use_triton):
        assert OP.choose(X) == choice


def test_environment_is_weaker_than_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSED_GPT_BACKEND that overrides a model's use_triton, or that is ignored."""
    monkeypatch.setattr(dispatch, "environment", "triton")
    assert backend() == "triton"
    with kernels.model_backend("reference"):
        assert backend() == "reference"
    with kernels.model_backend("auto"):
        assert backend() == "triton"
    with kernels.use_backend("auto"):
        assert backend() == "reference"


def test_a_setting_ends_when_its_block_raises() -> None:
    """A setting that remains after an exception ends its block."""
    with pytest.raises(KeyError), kernels.use_backend("triton"), kernels.model_backend("triton"):
        raise KeyError
    assert backend() == "reference"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda m: m.setattr(dispatch, "triton_version", None), "triton is not installed"),
        (lambda m: m.setattr(dispatch, "triton_version", (3, 5)), "triton 3.5 is older than 3.6"),
        (lambda m: m.setattr(dispatch, "interpreting", False), "tensors on cpu need TRITON_INTERPRET=1"),
    ],
)
def test_every_obstacle_without_a_gpu_has_a_reason(
    prepare: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing or wrong reason for the reference, or a request for Triton that is silently ignored."""
    prepare(monkeypatch)  # type: ignore[operator]
    assert OP.choose(X) == ("reference", reason)
    with kernels.model_backend("triton"):
        assert OP.choose(X) == ("reference", reason)
    with (
        kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match=f"layer_norm: .*cannot be honoured: {reason}"),
    ):
        OP.choose(X)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 5), None, ("reference", "sm_75 is older than sm_80")),
        ((8, 0), None, ("triton", "auto: the kernel applies")),
        ((9, 0), None, ("triton", "auto: the kernel applies")),
        ((13, 0), None, ("triton", "auto: the kernel applies")),
        ((9, 4), "6.4", ("reference", "ROCm is not supported")),
    ],
)
def test_gpus_are_supported_from_sm_80_on(
    capability: tuple[int, int], hip: str | None, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supported GPU that is refused, or an unsupported one that is accepted."""
    tensor = a_gpu(monkeypatch, *capability, hip)
    assert OP.choose(tensor) == expected  # type: ignore[arg-type]


def test_limits_and_the_table_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ignored limit of a family, or a table row that overrides an explicit use_backend("triton")."""
    tensor = a_gpu(monkeypatch, 9, 0)
    assert OP.choose(tensor, limit="D=512 is above 256") == ("reference", "D=512 is above 256")  # type: ignore[arg-type]
    assert OP.choose(tensor, slower="cuDNN wins") == ("reference", "auto: cuDNN wins")  # type: ignore[arg-type]
    with kernels.use_backend("triton"):
        assert OP.choose(tensor, slower="cuDNN wins").backend == "triton"  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="D=512 is above 256"):
            OP.choose(tensor, limit="D=512 is above 256")  # type: ignore[arg-type]


def test_a_row_of_the_table_holds_for_its_gpu_dtype_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that applies to GPUs, ops, dtypes or sizes that were not measured."""
    row = tuning.Slower(90, "layer_norm", torch.bfloat16, {"C": (16, 64)})
    monkeypatch.setattr(tuning, "SLOWER", (row,))
    tensor: Any = a_gpu(monkeypatch, 9, 0)
    for c, expected in ((15, False), (16, True), (64, True), (65, False)):
        assert (tuning.slower("layer_norm", tensor, N=7, C=c) is not None) == expected
    assert (
        tuning.slower("layer_norm", tensor, N=7, C=32) == "the tuning table has the reference faster on sm_90"
    )
    assert tuning.slower("add_layer_norm", tensor, N=7, C=32) is None
    assert tuning.slower("layer_norm", torch.empty(7, 32), N=7, C=32) is None
    for other in ({"architecture": 80}, {"dtype": torch.float32}):
        monkeypatch.setattr(tuning, "SLOWER", (row._replace(**other),))
        assert tuning.slower("layer_norm", tensor, N=7, C=32) is None


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_every_op_asks_the_table(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that ignores the tuning table in "auto", or looks up the wrong sizes."""
    case = spec.tagged("small")[0]
    asked: dict[str, dict[str, int]] = {}

    def slower(op: str, tensor: torch.Tensor, **sizes: int) -> str:
        asked[op] = sizes
        return "the table's reason"

    monkeypatch.setattr(f"kernels.{spec.family}.slower", slower)
    monkeypatch.setattr(dispatch.Op, "obstacle", lambda *_: None)
    inputs = spec.make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    with torch.no_grad():
        assert kernels.explain(spec.name, **inputs) == ("reference", "auto: the table's reason")
    assert case.sizes.items() <= asked[spec.name].items()


@pytest.mark.parametrize(
    ("change", "asks"),
    [
        ({}, True),
        ({"key_start": torch.zeros(1, dtype=torch.int32, device="meta")}, False),
        ({"dropout_p": 0.1}, False),
        ({"q": torch.empty(1, 4, 7, 16, device="meta")}, False),
        (dict.fromkeys("kv", torch.empty(1, 2, 8, 16, device="meta")), False),
    ],
)
def test_attention_asks_the_table_for_plain_calls_only(
    change: dict[str, Any], asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table measured without masks and dropout that selects PyTorch's slow forms of them."""
    monkeypatch.setattr("kernels.attention.slower", lambda *_, **sizes: "the table's reason")
    monkeypatch.setattr(dispatch.Op, "obstacle", lambda *_: None)
    inputs = dict.fromkeys("qkv", torch.empty(1, 4, 8, 16, device="meta")) | change
    assert (kernels.explain("causal_attention", **inputs).reason == "auto: the table's reason") == asks


def test_unsupported_dtypes_are_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that receives float64, or an interpreter that receives bfloat16 and computes it wrongly."""
    assert OP.obstacle(X.device, torch.float64) == "the kernel takes float32, float16, bfloat16, not float64"
    monkeypatch.setattr(dispatch, "trust_interpreted_bfloat16", False)
    assert OP.obstacle(X.device, torch.bfloat16) == "Triton's interpreter computes bfloat16 wrongly"
    monkeypatch.setattr(dispatch, "trust_interpreted_bfloat16", True)
    assert OP.obstacle(X.device, torch.bfloat16) is None


def test_one_warning_per_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Triton that gives no warning, repeats it, or omits an op in it."""
    monkeypatch.setattr(dispatch, "interpreting", False)
    with pytest.warns(kernels.FallbackWarning, match="need TRITON_INTERPRET=1") as caught:
        kernels.warn_if_unavailable(torch.device("cpu"), torch.float32)
    assert len(caught) == 1
    for name in dispatch._ops:
        assert name in str(caught[0].message)
    monkeypatch.setattr(dispatch, "interpreting", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warn_if_unavailable(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.use_backend("cuda"),
            "use_backend: all is 'cuda', expected one of triton, reference, auto",
        ),
        (
            lambda: kernels.use_backend(atention="triton"),
            "use_backend: 'atention' is not an op or family, expected one of add_layer_norm",
        ),
        (lambda: kernels.use_backend(attention="gpu"), "use_backend: attention is 'gpu', expected one of"),
        (lambda: kernels.model_backend("yes"), "model_backend: backend is 'yes', expected one of"),
        (lambda: kernels.model_backend(1), "model_backend: backend is 1, expected one of"),  # type: ignore[arg-type]
        (lambda: kernels.explain("softmax"), "explain: 'softmax' is not an op, expected one of"),
    ],
)
def test_unknown_names_are_refused(call: object, message: str) -> None:
    """A misspelt backend or op that silently does nothing."""
    with pytest.raises(ValueError, match="^" + message):
        call()  # type: ignore[operator]


def device_types() -> list[str]:
    """All device types of this torch, from its message about an unknown one; mkldnn is deprecated."""
    with pytest.raises(RuntimeError, match="Expected one of") as caught:
        torch.device("unknown")
    listed = str(caught.value).partition("Expected one of ")[2].partition(" device type")[0]
    return [name for name in listed.split(", ") if name != "mkldnn"]


@pytest.mark.parametrize("kind", device_types())
def test_autocast_is_read_on_every_device_type(kind: str) -> None:
    """A device type without autocast, such as meta, that raises; or one with autocast that is ignored."""
    device = torch.device(kind)
    assert dispatch.autocast_dtype(device) is None
    if torch.amp.is_autocast_available(kind):
        torch.set_autocast_enabled(kind, True)
        try:
            assert dispatch.autocast_dtype(device) == torch.get_autocast_dtype(kind)
        finally:
            torch.set_autocast_enabled(kind, False)


def test_explain_checks_arguments() -> None:
    """An `explain` that accepts arguments that the op refuses."""
    with pytest.raises(ValueError, match="layer_norm: weight has C=8, expected 4"):
        kernels.explain("layer_norm", torch.randn(3, 4), W)
    with pytest.raises(TypeError, match="missing a required argument: 'weight'"):
        kernels.explain("layer_norm", X)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_explain_computes_nothing(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `explain` that runs the op."""
    inputs = spec.make_inputs(
        spec.tagged("small")[0], torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    monkeypatch.setattr(
        f"kernels.{spec.family}.reference.{spec.name}", lambda *_, **__: pytest.fail("the reference ran")
    )
    with torch.no_grad():
        assert kernels.explain(spec.name, **inputs).backend == "reference"


def test_a_bad_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSED_GPT_BACKEND=nonsense that is treated as auto."""
    monkeypatch.setenv("FUSED_GPT_BACKEND", "nonsense")
    spec = importlib.util.spec_from_file_location("dispatch_of_another_process", dispatch.__file__)
    another = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, another)
    spec.loader.exec_module(another)
    op = another.Op("layer_norm", family="norm")
    with pytest.raises(RuntimeError) as caught:
        op.choose(X)
    assert str(caught.value) == ("FUSED_GPT_BACKEND is 'nonsense', expected one of triton, reference, auto")
