"""Checkpoints: a saved model loads unchanged, and a damaged checkpoint never loads."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import GPT, CharTokenizer, InputError
from gpt.errors import MachineError
from gpt.weights import checkpoint, pretrained
from gpt.weights.checkpoint import (
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_model,
    save_checkpoint,
    save_model,
)
from gpt.weights.hashes import write_sums
from tests.gpt.models import CONFIGS, SMALL, random_model, tokens

ROOT = Path(__file__).parents[3]
TOKENIZER = CharTokenizer("".join(map(chr, range(65, 65 + SMALL.vocab_size))))


@pytest.fixture
def model() -> GPT:
    return random_model().eval()


@pytest.fixture
def saved(model: GPT, tmp_path: Path) -> Path:
    """A checkpoint of a run, with all its files."""
    return save(tmp_path / "run", 1, model)


def save(out: Path, step: int, model: GPT) -> Path:
    return save_checkpoint(out, step, model, TOKENIZER, {"wte.weight/exp_avg": torch.ones(2)}, {"step": step})


def rehash(folder: Path) -> None:
    """Rewrites SHA256SUMS for the current content of the folder."""
    write_sums(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_equals_the_saved_one(name: str, tmp_path: Path) -> None:
    """Another config, a parameter left at its initial value, or a head that is no longer tied (bug 25)."""
    model = random_model(**CONFIGS[name]).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m").eval()
    assert loaded.config == model.config
    idx = tokens(2, 9)
    assert torch.equal(loaded(idx), model(idx))
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    loaded(idx, idx).backward()
    model(idx, idx).backward()
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        with torch.no_grad():
            ours -= ours.grad
            theirs -= theirs.grad
    assert torch.equal(loaded(idx), model(idx))


def test_a_checkpoint_from_before_a_field_has_its_default(tmp_path: Path) -> None:
    """A config.json written before GPTConfig had `residual` that is refused, or loads without shortcuts."""
    model = random_model().eval()
    save_model(model, tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    assert fields.pop("residual") is True
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields), "utf-8")
    rehash(tmp_path / "m")
    assert load_model(tmp_path / "m").config == model.config


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    """A half-precision model that is loaded in float32."""
    save_model(random_model().bfloat16(), tmp_path / "m")
    assert load_model(tmp_path / "m").wte.weight.dtype == torch.bfloat16


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    """Weights that are initialised only to be overwritten, or random numbers that a load consumes."""
    state = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tokenizer_is_saved_with_the_model(saved: Path, model: GPT, tmp_path: Path) -> None:
    """A checkpoint whose tokenizer is lost, or a traceback where there is none."""
    assert load_checkpoint_tokenizer(saved.parents[1]).encode("CAB") == [2, 0, 1]
    save_model(model, tmp_path / "bare")
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_checkpoint_tokenizer(tmp_path / "bare")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_verifies_a_checkpoint(saved: Path) -> None:
    """A SHA256SUMS that `sha256sum -c` cannot read, or that leaves out a file."""
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=saved, check=True, capture_output=True)
    listed = {line.split("  ")[1] for line in (saved / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in saved.iterdir()} - {"SHA256SUMS"}


def damages(folder: Path, count: int) -> list[tuple[str, bytes]]:
    """Random bit flips and truncations of the files in `folder`, equally many for each file."""
    rng = random.Random(0)
    damaged_files = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for i in range(count // 6):
            damaged = bytearray(content)
            if i % 4:
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            else:
                del damaged[rng.randrange(len(content)) :]
            damaged_files.append((path.name, bytes(damaged)))
    return damaged_files


def check_damages(saved: Path, count: int) -> None:
    originals = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert len(originals) == 6
    for name, content in damages(saved, count):
        (saved / name).write_bytes(content)
        with pytest.raises(InputError, match=r"^checkpoint: .*(damaged|lists|does not list)") as caught:
            find_checkpoint(saved)
        assert "\n" not in str(caught.value)
        (saved / name).write_bytes(originals[name])
    find_checkpoint(saved)


def test_damage_is_detected(saved: Path) -> None:
    """A flipped bit or a truncated file that is not detected."""
    check_damages(saved, 600)


@pytest.mark.slow
def test_damage_is_detected_ten_thousand_times(saved: Path) -> None:
    """A rare damage that is not detected."""
    check_damages(saved, 10_002)


def test_missing_and_unlisted_files_are_refused(saved: Path) -> None:
    """A checkpoint assembled from the files of different checkpoints."""
    (saved / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"has notes\.txt, which its SHA256SUMS does not list"):
        load_model(saved)
    (saved / "notes.txt").unlink()
    (saved / "config.json").rename(saved.parent / "config.json")
    with pytest.raises(InputError, match=r"lacks config\.json, which its SHA256SUMS lists"):
        load_model(saved)
    (saved.parent / "config.json").rename(saved / "config.json")
    sums = (saved / "SHA256SUMS").read_bytes()
    for damaged in (sums[:-1], sums + b"x", sums + sums[:80]):
        (saved / "SHA256SUMS").write_bytes(damaged)
        with pytest.raises(InputError, match="SHA256SUMS is damaged"):
            load_model(saved)
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"cannot read .*SHA256SUMS: No such file"):
        load_model(saved)


def test_a_config_must_fit_the_tensors(saved: Path) -> None:
    """Parameters copied into a model of another shape, because every hash is right."""
    config = json.loads((saved / "config.json").read_text())
    for change, words in (
        ({"n_inner": 24}, r"ffn\.down\.weight has shape \(16, 64\), expected \(16, 24\)"),
        ({"n_layer": 3}, r"lacks blocks\.2\."),
        ({"n_layer": 1}, r"has blocks\.1\..*, which the model of its config\.json does not"),
        ({"tie_weights": False}, r"lacks lm_head\.weight"),
        ({"n_layers": 2, "n_embed": 3}, "n_embed"),
        ({"n_head": 3}, "n_head"),
    ):
        (saved / "config.json").write_text(json.dumps(config | change))
        rehash(saved)
        with pytest.raises(InputError, match=words):
            load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_with_the_wrong_content_is_refused(name: str, saved: Path) -> None:
    """A traceback for a file with the right hash that is not JSON or safetensors as its name says."""
    (saved / name).write_bytes(b"[1]")
    rehash(saved)
    with pytest.raises(InputError, match=rf"checkpoint: .*{name}"):
        load_model(saved)


def test_the_newest_valid_checkpoint_is_used(model: GPT, tmp_path: Path) -> None:
    """A damaged newest checkpoint that ends the run, or an older one used without a warning."""
    for step in (9, 10, 100):
        save(tmp_path, step, model)
    assert find_checkpoint(tmp_path).name == "step-100"
    (tmp_path / "checkpoints/step-100/state.json").write_text("{}")
    with pytest.warns(
        UserWarning, match=r"step-10, which is not the newest checkpoint: .*step-100.*state\.json is damaged"
    ):
        assert find_checkpoint(tmp_path).name == "step-10"
    for step in (9, 10):
        (tmp_path / f"checkpoints/step-{step}/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-100.*step-10.*step-9"):
        find_checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """A traceback for a mistyped folder name."""
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_the_newest_three_are_kept(model: GPT, tmp_path: Path) -> None:
    """Old checkpoints that pile up, or a newest one that is removed."""
    for step in (1, 2, 3, 20, 100):
        save(tmp_path, step, model)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-100",
        "step-20",
        "step-3",
    ]


def test_a_failed_save_leaves_nothing(saved: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a checkpoint left on a full disk, or an earlier checkpoint lost."""
    run = saved.parents[1]

    def full(path: Path, content: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    for target in (
        lambda: save(run, 2, model),
        lambda: save(run, 1, model),
        lambda: save_model(model, run / "m"),
    ):
        with pytest.raises(MachineError, match=r"cannot write .*: No space left on device"):
            target()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    assert not (run / "m").exists()
    load_model(run)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_disk_that_fills_during_a_write_is_a_machine_error(tmp_path: Path) -> None:
    """A traceback for the error of safetensors, which is not an OSError."""
    code = """
import resource, sys
from gpt import GPT
from gpt.errors import MachineError
from gpt.weights.checkpoint import save_model
model = GPT(vocab_size=99, block_size=8, n_layer=1, n_head=1, n_embd=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_model(model, sys.argv[1])
except MachineError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("checkpoint: cannot write")
    assert "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


def test_save_model_replaces_only_checkpoints(model: GPT, tmp_path: Path) -> None:
    """A save that removes a folder of the user's other files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        save_model(model, tmp_path / "work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        save_model(model, tmp_path / "file" / "m")
    save_model(model, tmp_path / "m")
    with torch.no_grad():
        model.wte.weight.add_(1)
    save_model(model, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m").wte.weight, model.wte.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m", "work"]


def test_other_users_can_read_a_checkpoint(saved: Path) -> None:
    """Files that only their owner can read."""
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "SHA256SUMS").stat().st_mode}


def test_checkpoints_use_no_pickle() -> None:
    """A format that can run code when it is loaded."""
    for name in (
        "weights/checkpoint",
        "weights/commit",
        "weights/hashes",
        "weights/sharded",
        "weights/tensors",
        "data/dataset",
        "data/tokenizers",
        "training/evaluator",
        "training/optim",
        "training/run_folder",
        "training/saver",
        "training/step",
        "training/trainer",
    ):
        source = (ROOT / "gpt" / f"{name}.py").read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load", "torch.save", "allow_pickle=True"):
            assert word not in source, name


SAVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from gpt import GPT, CharTokenizer
from gpt.weights.checkpoint import save_checkpoint

torch.set_num_threads(1)
rng = random.Random(1)
model = GPT(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=64)
state = {"wte.weight/exp_avg": torch.zeros(300_000)}


def save_for_ever(out):
    out.mkdir()
    committed = os.open(out / "committed", os.O_WRONLY | os.O_CREAT)
    for step in range(1, 10**6):
        with torch.no_grad():
            model.wpe.weight.fill_(step)
        save_checkpoint(out, step, model, CharTokenizer("abcdefghi"), state, {"step": step})
        os.write(committed, f"{step} ".encode())


for number in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        save_for_ever(Path(sys.argv[1]) / str(number))
    time.sleep(0.1 + rng.random() * 0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def kill_saves(tmp_path: Path, kills: int) -> None:
    """Kills processes at random moments while they save one checkpoint after another, and checks the rest."""
    subprocess.run(
        [sys.executable, "-c", SAVER, tmp_path, str(kills)], cwd=ROOT, check=True, capture_output=True
    )
    for number in range(kills):
        out = tmp_path / str(number)
        committed = [int(step) for step in (out / "committed").read_text().split()]
        checkpoints = checkpoint.list_checkpoints(out)
        steps = [checkpoint.step_of(path) for path in checkpoints]
        for path, step in zip(checkpoints, steps, strict=True):
            assert (load_model(path).wpe.weight == step).all()
        assert set(committed[-checkpoint.KEPT + 1 :]) <= set(steps)
        checkpoint.clean(out, steps[-1] if steps else 0)
        # A kill between the rename of a new one and the removal of the oldest leaves one too many.
        assert set(names(out)) == {f"step-{step}" for step in steps[-checkpoint.KEPT :]}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_killed_save_loses_nothing(tmp_path: Path) -> None:
    """A committed checkpoint lost, or half a checkpoint listed, after a kill during a save."""
    kill_saves(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_fifty_killed_saves_lose_nothing(tmp_path: Path) -> None:
    """A moment in a save at which a kill loses a checkpoint."""
    kill_saves(tmp_path, 50)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_later_checkpoints_are_set_aside(model: GPT, tmp_path: Path) -> None:
    """A later checkpoint that stays the newest after a resume, that is lost, or that blocks the resume."""
    for _ in range(2):
        for step in (1, 2, 3):
            save(tmp_path, step, model)
        (tmp_path / "checkpoints/step-3/state.json").write_text("{}")
        checkpoint.clean(tmp_path, 1)
        assert find_checkpoint(tmp_path).name == "step-1"
    aside = ["step-2.superseded", "step-2.superseded-2", "step-3.damaged", "step-3.damaged-2"]
    assert names(tmp_path) == ["step-1", *aside]

    for step in (2, 3, 4):
        save(tmp_path, step, model)
    assert names(tmp_path) == sorted([*aside, "step-2", "step-3", "step-4"])
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-2", "step-3", "step-4"]
    load_model(tmp_path / "checkpoints/step-2.superseded")


@pytest.mark.filterwarnings("ignore:.* is missing because a save was interrupted")
def test_leftovers_of_kills_are_cleaned(model: GPT, tmp_path: Path) -> None:
    """The only copy of a checkpoint missed by a reader, or leftovers of kills that stay in a run."""
    for step in (1, 2):
        save(tmp_path, step, model)
    folder = tmp_path / "checkpoints"
    (folder / "step-2").rename(folder / ".replaced-step-2")
    (folder / ".unfinished-step-3").mkdir()
    (folder / ".unfinished-step-3/model.safetensors").touch()
    (folder / ".step-3.lock").touch()
    before = names(tmp_path)
    assert find_checkpoint(tmp_path) == find_checkpoint(folder / "step-2") == folder / ".replaced-step-2"
    assert list(map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path))) == [1, 2]
    load_model(folder / "step-2")
    assert names(tmp_path) == before
    checkpoint.clean(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("next_start", ["save", "resume"])
def test_what_a_killed_save_had_yet_to_remove(
    next_start: str, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint too many, or hidden files, that stay for ever because a save was killed before its end."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_tidy", lambda *_: None)
        for step in range(1, 6):
            save(tmp_path, step, model)
    (tmp_path / "checkpoints/.step-1.lock").touch()
    (tmp_path / "checkpoints/.unfinished-step-2").mkdir()
    if next_start == "resume":
        checkpoint.clean(tmp_path, 5)
        assert names(tmp_path) == ["step-3", "step-4", "step-5"]
    else:
        save(tmp_path, 6, model)
        assert names(tmp_path) == ["step-4", "step-5", "step-6"]


def test_a_reader_beside_a_run_takes_a_checkpoint_that_stays(
    model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt.sample that fails because the run removes the checkpoint that it has chosen."""
    save(tmp_path, 1, model)
    size, chosen = pretrained.weights_size, []

    def save_meanwhile(path: Path) -> int:
        chosen.append(path.name)
        if len(chosen) == 1:
            for step in range(2, 6):
                save(tmp_path, step, model)
        return size(path)

    monkeypatch.setattr(pretrained, "weights_size", save_meanwhile)
    loaded = pretrained.from_checkpoint(str(tmp_path), torch.device("cpu"), load_model)
    assert chosen == ["step-1", "step-5"]
    assert torch.equal(loaded.wte.weight, model.wte.weight)


def test_hashes_are_sha256(saved: Path) -> None:
    """A hash that is not computed from the bytes of the file."""
    for line in (saved / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((saved / name).read_bytes()).hexdigest()


def test_a_huge_claim_allocates_nothing(tmp_path: Path) -> None:
    """A config of a trillion parameters, with the right hash, that is allocated before it is refused."""
    GPT(vocab_size=17, block_size=8, n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / checkpoint.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_embd": 200_000}))
    rehash(tmp_path / "model")
    with pytest.raises(InputError, match=r"attn.proj.bias has shape \(8,\), expected \(200000,\)"):
        checkpoint.load_model(tmp_path / "model")
