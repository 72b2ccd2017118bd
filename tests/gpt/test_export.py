"""The model as a program: torch.export and torch.compile with a length that varies, and ONNX."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, ExportedProgram, export

from gpt import GPT
from tests.gpt.models import SMALL, random_model, tokens

SHAPES = ((2, 12), (1, 1), (3, 5))


def exported(model: GPT) -> ExportedProgram:
    shape = {0: Dim("batch"), 1: Dim("length", max=SMALL.block_size)}
    return export(model, (tokens(2, 8),), dynamic_shapes=(shape,))


@pytest.mark.parametrize(("use_triton", "gradients"), [(False, True), ("auto", False)])
def test_an_export_takes_any_batch_and_length(use_triton: bool | str, gradients: bool) -> None:
    """A size that the export fixes: a SymBool for attention, or a branch on the number of rows."""
    model = random_model(n_layer=1, use_triton=use_triton).eval()
    with torch.set_grad_enabled(gradients):
        program = exported(model).module()
    for shape in SHAPES:
        idx = tokens(*shape)
        torch.testing.assert_close(program(idx), model(idx))


def test_a_compiled_model_takes_any_length() -> None:
    """torch.compile that fails once the length varies: is_causal of attention is a SymBool."""
    model = random_model(n_layer=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for shape in SHAPES[::2]:
        idx = tokens(*shape)
        torch.testing.assert_close(compiled(idx), model(idx))


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"
)  # by the exporter itself
def test_onnx_gives_the_same_logits() -> None:
    """A graph in which onnxruntime computes something else, or takes only the length of the example."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = random_model(n_layer=1, use_triton=False).eval()
    onnx = torch.onnx.export(exported(model), dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(onnx.SerializeToString())
    for shape in SHAPES:
        idx = tokens(*shape)
        (logits,) = session.run(None, {"idx": idx.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(idx), rtol=1e-5, atol=1e-5)
