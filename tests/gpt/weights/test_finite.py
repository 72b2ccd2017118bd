"""Values that are not finite: never saved, never loaded, and never the newest valid checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt import GPT
from gpt.errors import InputError, NonFiniteError
from gpt.weights.checkpoint import find_checkpoint, load_model, save_checkpoint
from gpt.weights.hashes import write_sums
from gpt.weights.tensors import FLOATS, check_finite
from tests.gpt.models import random_model
from tests.gpt.weights.layouts import H, NanoGPT
from tests.gpt.weights.test_checkpoint import TOKENIZER, save

NAN = "blocks.1.ffn.up.weight holds 2 of 1,024 values that are infinite or NaN, expected finite ones"


def poison(model: GPT) -> GPT:
    with torch.no_grad():
        model.blocks[1].ffn.up.weight[3, 4] = math.nan
        model.blocks[1].ffn.up.weight[60, 0] = math.inf
    return model


def poison_file(path: Path, value: float = math.nan) -> None:
    """Puts `value` into the last tensor of a file, with a right hash, as an earlier version saved it."""
    tensors = load_file(path)
    list(tensors.values())[-1].view(-1)[-1] = value
    save_file(tensors, path)
    write_sums(path.parent)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_value_is_checked(value: float, dtype: torch.dtype) -> None:
    """A dtype or a position that is not checked, or the largest finite values refused as infinite."""
    largest = torch.finfo(dtype).max
    tensor = torch.full((70, 30), largest, dtype=dtype)
    tensor[0] = -largest
    tensors = {"step": torch.tensor(3), "empty": torch.empty(0), "one": torch.tensor(1.0), "a": tensor}
    check_finite(tensors, "the model")
    for place in ((0, 0), (35, 17), (69, 29)):
        damaged = tensor.clone()
        damaged[place] = value
        for view in (damaged, damaged.T):
            with pytest.raises(NonFiniteError, match=r"^the model: a holds 1 of 2,100 values"):
                check_finite(tensors | {"a": view}, "the model")


@pytest.mark.parametrize(
    "write",
    [
        lambda model, path: model.save_pretrained(path / "new"),
        lambda model, path: model.save_pretrained(path / "new", format="huggingface"),
        lambda model, path: save(path, 1, model),
    ],
    ids=["model", "huggingface", "run"],
)
def test_weights_that_are_not_finite_are_not_saved(write: Callable[[GPT, Path], Any], tmp_path: Path) -> None:
    """A diverged model that replaces a good one on the disk."""
    with pytest.raises(NonFiniteError) as raised:
        write(poison(random_model()), tmp_path)
    assert str(raised.value) == f"the model: {NAN}"
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """A moment of NaN that makes every later step NaN after a resume."""
    moments = {"wte.weight/exp_avg": torch.tensor([1.0, math.nan])}
    with pytest.raises(NonFiniteError, match=r"^the optimizer: wte\.weight/exp_avg holds 1 of 2 values"):
        save_checkpoint(tmp_path, 1, random_model(), TOKENIZER, moments, {"step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_poisoned_checkpoint_is_passed_over(name: str, tmp_path: Path) -> None:
    """A run that resumes from NaN, which an earlier version saved, with exit code 0."""
    for step in (1, 2):
        save(tmp_path, step, random_model())
    newest = tmp_path / "checkpoints/step-2"
    poison_file(newest / f"{name}.safetensors")
    with pytest.warns(
        UserWarning, match=rf"step-1, which is not the newest .*{name}\.safetensors: \S+ holds 1 of"
    ):
        assert find_checkpoint(tmp_path).name == "step-1"
    poison_file(tmp_path / "checkpoints/step-1" / f"{name}.safetensors", math.inf)
    with pytest.raises(NonFiniteError, match=r"step-2.*; .*step-1"):
        find_checkpoint(tmp_path)
    (newest / "state.json").write_text("")
    with pytest.raises(InputError, match=r"state\.json is damaged.*step-1"):
        find_checkpoint(tmp_path)


def test_a_poisoned_model_is_refused_by_name(tmp_path: Path) -> None:
    """Text sampled from a model of NaN, or a NaN loss, with exit code 0."""
    checkpoint = save(tmp_path, 1, random_model())
    poison_file(checkpoint / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"step-1/model\.safetensors: \S+ holds 1 of \S+ values"):
        load_model(checkpoint)

    random_model().save_pretrained(tmp_path / "export", format="huggingface")
    poison_file(tmp_path / "export/model.safetensors")
    with pytest.raises(NonFiniteError, match=r"export/model\.safetensors: \S+ holds 1 of \S+ values"):
        GPT.from_pretrained(tmp_path / "export")

    nano = NanoGPT()
    with torch.no_grad():
        nano.transformer["h"][0].attn["c_attn"].weight[0, 0] = math.inf
    torch.save(nano.state_dict(), tmp_path / "ckpt.pt")
    with pytest.raises(NonFiniteError, match=r"ckpt\.pt: h\.0\.attn\.c_attn\.weight holds 1 of"):
        GPT.from_pretrained(tmp_path / "ckpt.pt", {"n_head": H})


def test_integers_are_not_parameters(tmp_path: Path) -> None:
    """A traceback of torch, or weights that are silently converted, for a checkpoint of integers."""
    checkpoint = save(tmp_path, 1, random_model())
    tensors = load_file(checkpoint / "model.safetensors")
    for names in (tensors, ["ln_f.weight"]):
        save_file(
            tensors | {name: tensors[name].to(torch.int32) for name in names},
            checkpoint / "model.safetensors",
        )
        write_sums(checkpoint)
        with pytest.raises(InputError, match=r"is torch\.int32, expected a float dtype"):
            load_model(checkpoint)
