"""Checkpoints whose state.json or optimizer is not what a run wrote."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt import InputError, Trainer, train
from gpt.data.dataset import TokenData
from gpt.errors import NonFiniteError
from gpt.files import read_json
from gpt.training.run_folder import RunFolder
from gpt.training.run_state import read_state
from gpt.weights import checkpoint
from gpt.weights.tensors import read_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, TINY, make_model, run

MISSING = object()
WRONG = (MISSING, None, True, "x", -1, 10**400, 1e400, math.nan, 0.5, [], {}, [[]], {"a": 1}, ["\0"])
# What else the entries may be. TrainConfig checks those of "train".
RIGHT = [
    (("seconds",), 0.5),
    (("best",), None),
    (("best",), -1),
    (("best",), 0.5),
    (("best_step",), MISSING),  # in earlier versions
    (("rng", "cpu"), None),
    (("rng", "cuda"), None),
    (("scaler",), {}),
    (("scaler", "scale"), 0.5),
    (("data_identity",), "x"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose state.json has all entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 2)
        folder = tmp_path_factory.mktemp("saved")
        (folder / "text.txt").write_text(TEXT)
        flags = ["--data", str(folder / "text.txt"), "--out", str(folder / "run"), "--dtype", "float32"]
        assert train.main([*TINY, "--max_steps", "2", *flags]) == 0
    return folder / "run/checkpoints/step-2"


def paths(value: Any, path: tuple[str, ...] = ()) -> Any:
    """The path of each entry of a JSON object, down to the entries of objects in it."""
    for key, entry in value.items():
        yield (*path, key)
        if isinstance(entry, dict):
            yield from paths(entry, (*path, key))
        elif key == "rng":
            yield from (("rng", name) for name in entry[0])


def changed(state: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of `state` with another value at `path`, or without it."""
    state = json.loads(json.dumps(state))
    parent = state
    for key in path[:-1]:
        parent = parent[key]
        parent = parent[0] if isinstance(parent, list) else parent
    del parent[path[-1]]
    if value is not MISSING:
        parent[path[-1]] = value
    return state


def test_every_entry_of_the_state_is_checked(saved: Path, tmp_path: Path) -> None:
    """A traceback, or a message of several lines, for an entry that is missing, of a wrong type or huge."""
    state = read_json(saved / checkpoint.STATE)
    state["scaler"] = {"scale": 2.0, "_growth_tracker": 1}
    file = tmp_path / saved.name / checkpoint.STATE
    file.parent.mkdir()
    file.write_text(json.dumps(state))
    assert read_state(file).progress.step == 2

    accepted, messages = [], []
    for path in paths({key: entry for key, entry in state.items() if key not in ("data", "working_folder")}):
        for value in WRONG:
            file.write_text(json.dumps(changed(state, path, value)))
            try:
                read_state(file)
            except InputError as error:
                messages.append(str(error))
            else:
                accepted.append((path, value))
    for message in messages:
        assert message.startswith(("resume: ", "checkpoint: "))
        assert message.isprintable()
    assert [(path, value) for path, value in accepted if path[0] != "train"] == RIGHT
    assert (("train", "seed"), MISSING) not in accepted


def test_every_entry_of_the_data_settings_is_checked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or data of another kind, for settings of the data that are missing or of a wrong type."""
    state = read_json(saved / checkpoint.STATE)
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    monkeypatch.setattr(checkpoint, "load_checkpoint_tokenizer", lambda folder: None)  # verifies the files
    given: Any = {"model": {}, "train": {}, "data": {}}
    assert train._from_run(folder, given).data.data == tuple(state["data"]["data"])
    messages = []
    for path in [("data",), ("working_folder",), *(("data", name) for name in state["data"])]:
        for value in WRONG:
            (folder / checkpoint.STATE).write_text(json.dumps(changed(state, path, value)))
            try:
                data = train._from_run(folder, given).data
            except InputError as error:
                messages.append(str(error))
            else:
                assert isinstance(data.data, tuple)
                assert isinstance(data.pack_documents, bool)
    assert len(messages) > 50
    assert [message for message in messages if "state.json: data" not in message] == []


def damage(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Changes one tensor of an optimizer or a model, or its name."""
    name = min(tensors)
    tensor = tensors.pop(name)
    if kind == "missing":
        return
    tensors[f"{name}x" if kind == "name" else name] = {
        "integers": tensor.long(),
        "shape": tensor[..., None].repeat_interleave(2, -1),
        "scalar": tensor.sum(),
        "nan": torch.full_like(tensor, math.nan),
        "inf": torch.full_like(tensor, -math.inf),
        "name": tensor,
    }[kind]


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_loaded_as_a_whole(
    optimizer: str, file: str, data: TokenData, tmp_path: Path
) -> None:
    """Half of a checkpoint in model or optimizer, or values that are not finite, before the error."""
    config = replace(CONFIG, optimizer=optimizer, max_steps=1)
    run(data, tmp_path, config)
    folder = tmp_path / "checkpoints/step-1"
    whole = read_tensors(folder / file)
    trainer = Trainer(make_model(data), TokenData.from_text(TEXT), config)
    with torch.no_grad():
        trainer.model.wte.weight.zero_()

    def state() -> dict[str, torch.Tensor]:
        parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return parameters | {name: t.clone() for name, t in trainer._step.tensors().items()}

    before = state()
    for kind in ("integers", "shape", "scalar", "nan", "inf", "name", "missing"):
        tensors = dict(whole)
        damage(kind, tensors)
        save_file(tensors, folder / file)
        if kind == "integers" and file == checkpoint.MODEL:
            continue
        error = NonFiniteError if kind in ("nan", "inf") else InputError
        with pytest.raises(error, match=file.replace(".", r"\.")):
            RunFolder(tmp_path).restore(folder, trainer.model, trainer._step, data)
        after = state()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), kind
    save_file(whole, folder / file)
    RunFolder(tmp_path).restore(folder, trainer.model, trainer._step, data)
    assert not torch.equal(trainer.model.wte.weight, before["wte.weight"])
