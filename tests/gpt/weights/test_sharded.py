"""Checkpoints of sharded runs: made in two and four processes by sharded_runs.py, read in this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt import GPT, InputError, eval, info, sample
from gpt.errors import MachineError, NonFiniteError
from gpt.files import read_json
from gpt.weights import checkpoint
from gpt.weights.checkpoint import find_best_checkpoint, find_checkpoint, load_model
from gpt.weights.files import weights_size
from gpt.weights.hashes import write_sums
from gpt.weights.sharded import FILES, read_parts, tensor_files
from gpt.weights.tensors import read_tensors, write_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.forks import needs_fork
from tests.gpt.weights import sharded_runs
from tests.gpt.weights.sharded_runs import DDP, FSDP, GROUPS, STAGES, STOPPED

ROOT = Path(__file__).parents[3]

pytestmark = needs_fork


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder of all runs, the results of each rank by group, and how each rank ended."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FUSED_GPT_CACHE": str(folder / "cache")}
    program = [sys.executable, "-m", "tests.gpt.weights.sharded_runs", str(folder)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ends = read_json(folder / "ends.json")
    results = {}
    for group, (size, _) in GROUPS.items():
        if group not in STAGES:
            assert [end["code"] for end in ends[group]] == [0] * size, ends[group]
            results[group] = [torch.load(folder / f"{group}-{r}.pt", weights_only=False) for r in range(size)]
    return SimpleNamespace(folder=folder, ends=ends, **results)


@pytest.fixture
def saved(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of a sharded run."""
    return Path(shutil.copytree(made.folder / "straight", tmp_path / "run"))


def newest(run: Path) -> Path:
    return checkpoint.list_checkpoints(run)[-1]


def content(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    return {**read_parts(folder, FILES[0]), **read_parts(folder, FILES[1])}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(actual[key], expected[key])]


def test_a_sharded_checkpoint_is_the_state_of_the_run(made: SimpleNamespace) -> None:
    """Weights or optimizer's state that are not the run's, a pickle, or one rank's part alone."""
    result, state = made.two[0]["straight"]
    assert result.checkpoint == newest(made.folder / "straight")
    assert_equal(content(result.checkpoint), state)
    names = {path.name for path in result.checkpoint.iterdir()}
    shards = {f"shard-0000{r}-model-0000{part}-of-00002.safetensors" for r in (1, 2) for part in (1, 2)}
    assert names == {"SHA256SUMS", "config.json", "state.json", "tokenizer.json"} | shards
    whole = sum(
        read_tensors(path)["wte.weight"].numel() for path in tensor_files(result.checkpoint, FILES[0])
    )
    assert whole == state["wte.weight"].numel()


def test_the_same_ranks_resume_bit_by_bit(made: SimpleNamespace) -> None:
    """A resumed run that differs from an uninterrupted one, or a signal that does not save."""
    for rank in range(2):
        stopped = made.two[rank]["stopped"]
        assert (stopped.step, stopped.checkpoint.name) == (STOPPED, f"step-{STOPPED}")
        straight, last = made.two[rank]["straight"]
        _, warned, result, state = made.two[rank]["same"]
        assert result.validation_loss == straight.validation_loss
        assert not warned
        assert_equal(state, last)


@pytest.mark.parametrize("name", ["ddp", "whole", "four", "alone"])
def test_other_ranks_resume_the_same_state(name: str, made: SimpleNamespace) -> None:
    """Weights or optimizer's state that another number of ranks, or another `parallel`, changes."""
    expected = content(made.folder / name / f"checkpoints/step-{STOPPED}")
    if name == "alone":
        ranks = [sharded_runs.resumed(name, DDP, ends=False)(sharded_runs.Ranks(), made.folder)]
    else:
        ranks = [results[name] for results in (made.four if name == "four" else made.two)]
    for before, warned, *ends in ranks:
        assert_equal(before, expected)
        assert "continues with" in warned[0]
        assert not ends or ends[0].step == FSDP.max_steps


def test_training_goes_on_while_a_checkpoint_is_saved(made: SimpleNamespace) -> None:
    """A save for which training waits, with weights from after its step, or visible before it is complete."""
    for rank in range(2):
        assert made.two[rank]["background"][0] == [True]
    _, before, visible, newest, _ = made.two[0]["background"]
    assert visible == []
    assert_equal(read_parts(newest, FILES[0]), before)


def test_a_value_of_one_rank_that_is_not_finite_is_not_saved(made: SimpleNamespace) -> None:
    """A sharded checkpoint with a NaN, or an error on one rank alone, at which the others wait for ever."""
    for rank in range(2):
        kind, message = made.two[rank]["background"][-1]
        assert kind is NonFiniteError
        assert "the model: blocks.0.ffn.up.weight holds 1 of" in message
    assert os.listdir(made.folder / "background/checkpoints") == ["step-1"]


def test_an_error_in_the_background_is_raised_on_all_ranks(made: SimpleNamespace) -> None:
    """A failed save that one rank alone reports, that removes an earlier checkpoint, or that leaves files."""
    target = made.folder / "failing/checkpoints"
    expected = [
        (MachineError, f"checkpoint: cannot write {target / 'step-2'}: No space left on device"),
        ("step-1", ["step-1"]),
        (InputError, f"checkpoint: cannot write {target / 'step-3'}: No such file or directory"),
        ("step-1", ["step-1"]),
    ]
    assert [made.two[rank]["failing"] for rank in range(2)] == [expected] * 2
    assert find_checkpoint(made.folder / "failing").name == "step-4"


@pytest.mark.filterwarnings("ignore:.* is missing because a save was interrupted")
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_loses_nothing(stage: str, made: SimpleNamespace) -> None:
    """The only checkpoint lost, or half of one that counts, after kill -9 at a stage of a save."""
    assert sorted(end["code"] for end in made.ends[stage]) == [1, 137]
    folder = made.folder / stage.replace(" ", "-")
    whole = "step-2" if stage == "renamed" else ".replaced-step-1" if stage == "set aside" else "step-1"
    assert find_checkpoint(folder).name == whole
    weights = load_model(folder)
    checkpoint.save_checkpoint(folder, 3, weights, sharded_runs.data().tokenizer, {}, {"step": 3})
    left = {"step-3", "step-1"} | ({"step-2"} if stage == "renamed" else set())
    assert set(os.listdir(folder / "checkpoints")) == left


def test_replicas_are_saved_once(made: SimpleNamespace) -> None:
    """A tensor of hybrid sharding that is stored twice, or one with fewer rows than ranks that is lost."""
    folder = find_checkpoint(made.folder / "hybrid")
    assert_equal(content(folder), made.four[0]["hybrid"])
    stored = sum(
        t.nbytes for name in FILES for f in tensor_files(folder, name) for t in read_tensors(f).values()
    )
    assert stored == sum(tensor.nbytes for tensor in made.four[0]["hybrid"].values())


@pytest.mark.parametrize("format", ["fused-gpt", "huggingface"])
def test_a_sharded_checkpoint_is_exported(format: str, made: SimpleNamespace, tmp_path: Path) -> None:
    """An export whose weights are not bit-equal to the run's, or that is still in shards."""
    result, state = made.two[0]["straight"]
    for path in (result.checkpoint, made.folder / "straight"):
        GPT.from_pretrained(path).save_pretrained(tmp_path / "export", format=format)
        model = GPT.from_pretrained(tmp_path / "export")
        assert_equal(dict(model.named_parameters()), {k: t for k, t in state.items() if "/" not in k})
        assert (tmp_path / "export" / FILES[0]).is_file()


def test_the_commands_take_a_sharded_run(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that does not read shards, or that counts the optimizer's state as weights."""
    (tmp_path / "text.txt").write_text(TEXT[:300])
    common = ["--checkpoint", str(saved), "--device", "cpu", "--use_triton", "false"]
    assert sample.main([*common, "--max_new_tokens", "3"]) in (0, None)
    assert eval.main([*common, "--data", str(tmp_path / "text.txt")]) in (0, None)
    assert info.main([str(saved)]) in (0, None)
    assert "perplexity" in capsys.readouterr().out
    parameters = sum(p.nbytes for p in load_model(saved).parameters())
    assert parameters < weights_size(newest(saved)) < parameters + 20_000  # headers
    assert find_best_checkpoint(saved).name == f"step-{FSDP.eval_interval}"


def test_damage_of_any_file_is_refused(saved: Path) -> None:
    """A flipped bit of a shard that is used, or a run that does not go back to its last valid checkpoint."""
    folder = newest(saved)
    earlier = checkpoint.list_checkpoints(saved)[-2]
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    for file in files:
        intact = file.read_bytes()
        for place in (0, 8, len(intact) // 2, len(intact) - 1):
            damaged = bytearray(intact)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=f"{file.name} is damaged"):
                find_checkpoint(folder)
        if file in tensor_files(folder, FILES[0]):
            with pytest.raises(InputError, match=f"{file.name} is damaged"):
                load_model(folder)
        with pytest.warns(UserWarning, match=f"not the newest checkpoint: .*{file.name} is damaged"):
            assert find_checkpoint(saved) == earlier
        file.unlink()
        with pytest.raises(InputError, match=f"lacks {file.name}"):
            find_checkpoint(folder)
        file.write_bytes(intact)
    assert find_checkpoint(saved) == folder


def shard(folder: Path, rank: int, offset: Any, tensor: Tensor, name: str = "wte.weight") -> None:
    """Writes a shard of one tensor among the weights; an `offset` of None states none."""
    stated = {"DCP_SHARDING_INFO": json.dumps({} if offset is None else {name: {"saved_offsets": offset}})}
    write_tensors(folder / f"shard-0000{rank}-model-00001-of-00002.safetensors", {name: tensor}, stated)


ROWS = torch.ones(2, 3)
WRONG: dict[str, tuple[Sequence[tuple[Any, ...]], str]] = {
    "overlap": ([(1, [0, 0], ROWS), (2, [1, 0], ROWS)], "overlap, leave a gap"),
    "twice": ([(1, [0, 0], ROWS), (2, [0, 0], ROWS)], "overlap, leave a gap"),
    "gap": ([(1, [0, 0], ROWS), (2, [3, 0], ROWS)], "overlap, leave a gap"),
    "no first row": ([(1, [2, 0], ROWS)], "overlap, leave a gap"),
    "columns": ([(1, [0, 0], ROWS), (2, [0, 3], ROWS)], "overlap, leave a gap"),
    "width": ([(1, [0, 0], ROWS), (2, [2, 0], torch.ones(2, 4))], "differ in shape"),
    "dtype": ([(1, [0, 0], ROWS), (2, [2, 0], ROWS.double())], "differ in shape or dtype"),
    "dimensions": ([(1, [0, 0], ROWS), (2, [2], torch.ones(2))], "differ in shape"),
    "scalars": ([(1, [], torch.ones(())), (2, [], torch.ones(()))], "overlap, leave a gap"),
    "negative": ([(1, [-1, 0], ROWS)], "overlap, leave a gap"),
    "unstated": ([(1, None, ROWS)], "does not state where its rows of wte.weight begin"),
    "text": ([(1, "00", ROWS)], "does not state where"),
    "truth": ([(1, [False, 0], ROWS)], "does not state where"),
    "short": ([(1, [0], ROWS)], "does not state where"),
    "other file": ([(1, [0, 0], ROWS, "wte.weight/exp_avg")], "expected tensors of model.safetensors alone"),
    "other shape": ([(1, [0, 0], ROWS)], r"wte.weight has shape \(2, 3\), expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shards_that_are_not_rows_of_a_tensor_are_refused(name: str, saved: Path) -> None:
    """Uninitialised memory, or the rows of another tensor, that become weights."""
    folder = newest(saved)
    shards, message = WRONG[name]
    kept = {key: t for key, t in read_parts(folder, FILES[0]).items() if key != "wte.weight"}
    for path in tensor_files(folder, FILES[0]):
        path.unlink()
    shard_3 = folder / "shard-00003-model-00001-of-00002.safetensors"
    write_tensors(shard_3, kept)
    for arguments in shards:
        shard(folder, *arguments)
    write_sums(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_hostile_metadata_is_refused(saved: Path) -> None:
    """A traceback, or files that the writer does not write, in a folder whose hashes are right."""
    folder = newest(saved)
    path = tensor_files(folder, FILES[0])[0]
    tensors = read_tensors(path)
    intact = path.read_bytes()
    for text, message in (("[" * 100_000, "is not JSON"), ("[]", "holds a list"), ("{", "is not JSON")):
        write_tensors(path, {k: t.clone() for k, t in tensors.items()}, {"DCP_SHARDING_INFO": text})
        write_sums(folder)
        with pytest.raises(InputError, match=message):
            load_model(folder)
    path.write_bytes(intact)
    shutil.copy(path, folder / "other.safetensors")
    write_sums(folder)
    with pytest.raises(InputError, match=r"other\.safetensors belongs to no checkpoint"):
        load_model(folder)
    (folder / "other.safetensors").unlink()
    write_sums(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
