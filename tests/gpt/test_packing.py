"""Models in other dtypes for generation: bfloat16 and int8 on a CPU, and what such models refuse."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernels
from gpt import GPT, InputError, TrainConfig, eval, sample
from gpt.packing import FORMATS, generation_format, pack_weights
from gpt.training.step import TrainStep
from gpt.weights.checkpoint import save_model
from tests.gpt.models import BYTES, CONFIGS, padded, random_byte_model, random_model, tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")
each_format = pytest.mark.parametrize("format", FORMATS)


def dense(model: GPT) -> GPT:
    """A copy of a packed model with the values of its weights in ordinary tensors."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), kernels.PackedWeight):
            module.weight = nn.Parameter(module.weight.dense(), requires_grad=False)
    return model


@each_format
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_packed_models_compute_what_their_weights_say(fields: dict[str, Any], format: str) -> None:
    """A matrix that is left out, or packed weights that another path of the model reads differently."""
    model = pack_weights(random_model(**fields).eval(), format)
    plain, idx = dense(model), tokens(2, 9)
    packed = [name for name, p in model.named_parameters() if isinstance(p, kernels.PackedWeight)]
    matrices = [name for name, p in plain.named_parameters() if p.ndim == 2]
    assert packed == [name for name in matrices if name != "wpe.weight"]

    tolerance = {"rtol": 1e-4, "atol": 1e-4} if format == "int8" else {"rtol": 0.1, "atol": 0.6}
    torch.testing.assert_close(model(idx), plain(idx), **tolerance)
    torch.testing.assert_close(model(idx, idx), plain(idx, idx), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model(idx[:, :1]), plain(idx[:, :1]), **tolerance)
    if format == "int8":  # in bfloat16, roundings decide between close tokens
        prompts, mask = padded([tokens(1, 7), tokens(1, 2)])
        for call in ({"idx": idx}, {"idx": prompts, "attention_mask": mask}):
            ids = model.generate(max_new_tokens=6, do_sample=False, **call)
            assert torch.equal(ids, plain.generate(max_new_tokens=6, do_sample=False, **call))
    assert model.generate(idx, 20, temperature=2.0, top_p=0.9).shape == (2, 29)


def test_decoding_reads_the_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step that unpacks its weights, which takes longer than float32."""
    model = pack_weights(random_model().eval(), "int8")
    unpacked: list[torch.Size] = []
    unpack = kernels.PackedWeight.dense

    def record(self: kernels.PackedWeight) -> torch.Tensor:
        unpacked.append(self.shape)
        return unpack(self)

    monkeypatch.setattr(kernels.PackedWeight, "dense", record)
    model.generate(tokens(1, 10), 1)
    assert len(unpacked) == 2 * 4  # the prompt's rows; the head has one row
    model.generate(tokens(1, 8), 4)
    assert len(unpacked) == 2 * 4


@each_format
def test_packed_models_are_for_generation(format: str, tmp_path: Path) -> None:
    """A checkpoint of dequantized weights, gradients of nothing, or a conversion that is half done."""
    model = pack_weights(random_model(), format)
    for refused, what in (
        (lambda: model.save_pretrained(tmp_path / "own"), "saved"),
        (lambda: model.save_pretrained(tmp_path / "hf", "huggingface"), "saved"),
        (lambda: TrainStep(model, TrainConfig(device="cpu")), "trained"),
        (lambda: model.to(torch.float16), "moved or converted"),
        (lambda: model.to("meta"), "moved or converted"),
    ):
        with pytest.raises(InputError, match=f"quantized for generation is {what}, expected the model"):
            refused()
    assert not list(tmp_path.iterdir())
    ids = model.to("cpu").eval().generate(tokens(1, 3), 5, do_sample=False)
    assert torch.equal(copy.deepcopy(model).generate(ids[:, :3], 5, do_sample=False), ids)


def test_from_pretrained_converts(tmp_path: Path) -> None:
    """A dtype or format that is ignored, or that does not fit the rest."""
    model = random_byte_model()
    save_model(model, tmp_path / "m", BYTES)
    path = tmp_path / "m"
    assert GPT.from_pretrained(path).dtype == torch.float32
    assert GPT.from_pretrained(path, dtype="bfloat16").wte.weight.equal(model.wte.weight.bfloat16())
    for format, dtype in (("bfloat16", torch.bfloat16), ("int8", torch.float32)):
        for given in (None, dtype):
            packed = GPT.from_pretrained(path, dtype=given, quantize=format)
            assert isinstance(packed.wte.weight, kernels.PackedWeight)
            assert packed.dtype == packed.ln_f.weight.dtype == dtype

    for options, message in (
        ({"quantize": "int4"}, "quantize is 'int4', expected bfloat16, int8 or None"),
        ({"quantize": "int8", "dtype": "bfloat16"}, "dtype is torch.bfloat16 with quantize='int8', expected"),
        ({"quantize": "int8", "device": "meta"}, "quantize is 'int8' on meta, expected device='cpu', or"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16, float16, float64"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            GPT.from_pretrained(path, **options)


def test_what_dtype_means_on_each_device() -> None:
    """int8 on a GPU that is ignored, or bfloat16 on a CPU that is not packed."""
    assert generation_format("auto", CPU) == generation_format("auto", GPU) == (None, None)
    assert generation_format("float32", CPU) == ("float32", None)
    assert generation_format("bfloat16", CPU) == (None, "bfloat16")
    assert generation_format("bfloat16", GPU) == ("bfloat16", None)
    assert generation_format("int8", CPU) == (None, "int8")
    with pytest.raises(InputError, match="--dtype is int8 on cuda, expected bfloat16 or float16, or"):
        generation_format("int8", GPU)
    with pytest.raises(InputError, match="--dtype is float16 on a CPU, expected float32, bfloat16 or int8"):
        generation_format("float16", CPU)


def test_the_commands_take_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dtype without effect, a loss far from that of float32, or speed in the text of the sample."""
    save_model(random_byte_model(), tmp_path / "m", BYTES)
    (tmp_path / "text.txt").write_text("the cat on the mat " * 9)
    flags = ["--checkpoint", str(tmp_path / "m"), "--device", "cpu"]
    losses = {}
    for dtype in ("auto", "float32", "bfloat16", "int8"):
        assert eval.main([*flags, "--data", str(tmp_path / "text.txt"), "--dtype", dtype]) == 0
        losses[dtype] = float(capsys.readouterr().out.split()[1])
    assert losses["auto"] == losses["float32"]
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.05

    greedy = [*flags, "--prompt", "the", "--greedy", "--max_new_tokens", "6", "--dtype", "int8"]
    assert sample.main([*greedy, "--verbose"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"\d tokens of prompt, first token after [\d.]+ s, 5 more in [\d.]+ s: [\d,.]+ tokens/s\n",
        printed.err,
    )
    assert sample.main(greedy) == 0
    assert capsys.readouterr() == (printed.out, "")
