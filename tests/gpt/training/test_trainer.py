"""The training loop: its log, its evaluations, and runs that are stopped and resumed."""

from __future__ import annotations

import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, GPTConfig, InputError, Trainer
from gpt.data.dataset import Batch, TokenData
from gpt.errors import NonFiniteError
from gpt.files import read_json
from gpt.training.optim import learning_rate
from gpt.training.run_folder import RunFolder
from gpt.weights import checkpoint
from gpt.weights.tensors import read_tensors
from tests.gpt.text import TEXT
from tests.gpt.training.small_runs import CONFIG, make_model, read_log, run, stop_at, without_times


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_equal_bit_by_bit(optimizer: str, data: TokenData, tmp_path: Path) -> None:
    """A resume that loses the random state, the batch order, the optimizer or the schedule (bug 24)."""
    config = replace(CONFIG, optimizer=optimizer)
    straight = run(data, tmp_path / "straight", config)
    out = tmp_path / "stopped"
    for resume, (step, micro_step) in ((False, (2, 1)), (True, (4, 0))):
        stopped = run(stop_at(TokenData.from_text(TEXT), step, micro_step), out, config, resume=resume)
        assert (stopped.step, stopped.signal) == (step + 1, signal.SIGINT)
        assert stopped.checkpoint == out / f"checkpoints/step-{step + 1}"
        torch.manual_seed(step)
    resumed = run(data, out, config, resume=True)
    assert replace(resumed, checkpoint=None) == replace(straight, checkpoint=None)
    assert without_times(read_log(out)) == without_times(read_log(tmp_path / "straight"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        resumed_tensors = read_tensors(out / "checkpoints/step-8" / name)
        tensors = read_tensors(tmp_path / "straight/checkpoints/step-8" / name)
        assert resumed_tensors.keys() == tensors.keys()
        assert all(torch.equal(resumed_tensors[key], tensors[key]) for key in tensors)
    kind = {"adamw": "exp_avg", "muon": "momentum_buffer"}[optimizer]
    assert {"wte.weight/exp_avg", f"blocks.0.attn.qkv.weight/{kind}"} < tensors.keys()
    seconds = [record["seconds"] for record in read_log(out)]
    assert seconds == sorted(seconds)


def test_a_finished_run_can_be_resumed(data: TokenData, tmp_path: Path) -> None:
    """A finished run that cannot be extended, or that changes although no steps are left."""
    first = run(data, tmp_path)
    lines = read_log(tmp_path)
    again = run(data, tmp_path, resume=True)
    assert again == first
    assert read_log(tmp_path) == lines
    longer = run(data, tmp_path, replace(CONFIG, max_steps=10), resume=True)
    assert longer.step == 10
    assert [record["step"] for record in read_log(tmp_path) if record.get("final")] == [10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number: int, data: TokenData, tmp_path: Path) -> None:
    """A stop that loses the current step, or signal handlers that stay after training."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = run(stop_at(data, 4, 1, number), tmp_path)
    assert result.signal == number
    assert read_json(tmp_path / "checkpoints/step-5/state.json")["step"] == 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_log_has_the_documented_keys(data: TokenData, tmp_path: Path) -> None:
    """A record without a documented key, or with a value that is not what its key says."""
    result = run(data, tmp_path, replace(CONFIG, log_interval=4))
    records = read_log(tmp_path)
    assert [record["step"] for record in records] == [1, 3, 4, 6, 8]
    keys = {"step", "seconds", "tokens", "train_loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    assert all(keys <= record.keys() for record in records)
    assert [record["step"] for record in records if "validation_loss" in record] == [3, 6, 8]
    assert [record["tokens"] for record in records] == [64 * record["step"] for record in records]
    last = records[-1]
    assert last["final"] is True
    assert not any("final" in record for record in records[:-1])
    assert last["seconds"] == pytest.approx(sum(
        (b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in itertools.pairwise(records)
    ) + 64 / records[0]["tokens_per_second"])  # fmt: skip
    assert last["bigram_loss"] == data.bigram_loss() == result.bigram_loss
    assert last["learning_rate"] == learning_rate(7, replace(CONFIG, log_interval=4))
    model = checkpoint.load_model(tmp_path, device="cpu").eval()
    total = 0.0
    validation = torch.from_numpy(data.tokens("validation").astype("int64"))
    for i in range(0, len(validation) - 1, 16):
        x, y = validation[i : i + 16], validation[i + 1 : i + 17]
        total += F.cross_entropy(model(x[None, : len(y)])[0], y, reduction="sum").item()
    assert last["validation_loss"] == pytest.approx(total / (len(validation) - 1), rel=1e-5)
    assert last["validation_loss"] == result.validation_loss
    assert (tmp_path / "sample.txt").read_text() == result.sample + "\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_norms_are_logged_per_layer(data: TokenData, tmp_path: Path) -> None:
    """Norms that are taken after clipping, or a layer without a norm."""
    run(data, tmp_path, replace(CONFIG, grad_clip=0.01))
    for record in read_log(tmp_path):
        norms = record["gradient_norms"]
        assert set(norms) == {"wte", "wpe", "blocks.0", "ln_f"}
        assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(
            record["gradient_norm"], rel=1e-4
        )
        assert record["gradient_norm"] > 0.01


def test_mfu_follows_its_formula(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An MFU by another formula, without a known peak, against another than the given one, or not shown."""
    run(data, tmp_path / "unknown", replace(CONFIG, max_steps=1))
    assert read_log(tmp_path / "unknown")[0]["mfu"] is None
    assert "MFU" not in capsys.readouterr().err
    monkeypatch.setattr("gpt.training.trainer.peak_flops", lambda device, dtype: 1e9)
    run(data, tmp_path / "known", replace(CONFIG, max_steps=1))
    record = read_log(tmp_path / "known")[0]
    flops = 6 * (make_model(data).num_parameters() - 16 * 16) + 12 * 1 * 2 * 8 * 16
    assert record["mfu"] == pytest.approx(flops * record["tokens_per_second"] / 1e9)
    assert f"{record['mfu']:.1%} MFU" in capsys.readouterr().err
    run(data, tmp_path / "given", replace(CONFIG, max_steps=1, peak_tflops=1e-2))
    record = read_log(tmp_path / "given")[0]
    assert record["mfu"] == pytest.approx(flops * record["tokens_per_second"] / 1e10)


def test_training_learns_without_a_folder(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop whose loss does not fall, or that writes files although no folder is given."""
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, max_steps=250, batch_size=8, eval_interval=1000, learning_rate=2e-2)
    result = Trainer(make_model(data, dropout=0.0), data, config).run()
    assert result.validation_loss is not None
    assert result.validation_loss < data.bigram_loss() - 0.1
    assert not list(tmp_path.iterdir())


def test_estimates_use_the_same_batches(data: TokenData) -> None:
    """Estimates over different batches, with dropout, or that consume random numbers."""
    trainer = Trainer(make_model(data), data, CONFIG)
    state = torch.get_rng_state()
    assert [trainer.estimate("train")] * 2 == [trainer.estimate("train"), trainer.estimate("train")]
    assert trainer.estimate("train") != trainer.estimate("validation")
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training


def test_a_sample_has_no_padding_ids(data: TokenData, tmp_path: Path) -> None:
    """A padded vocabulary whose extra ids reach the sample, which the tokenizer then rejects (bug 26)."""
    vocab_size = data.tokenizer.vocab_size
    model = make_model(data, head_bias=True, vocab_size=vocab_size + 7)
    with torch.no_grad():
        model.lm_head.bias[vocab_size:] = 50
    result = Trainer(model, data, replace(CONFIG, max_steps=1), out=tmp_path).run()
    assert result.sample is not None
    assert set(result.sample) <= set(TEXT)


def test_patience_stops_the_run(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that stops at its best loss, that never stops early, or that does not say why it stops."""
    losses = iter([3.0, 2.0, 2.5, 1.9, 1.9, math.nan, 1.8])
    monkeypatch.setattr(Trainer, "estimate", lambda self, split: 0.0 if split == "train" else next(losses))
    result = run(data, tmp_path, replace(CONFIG, max_steps=9, eval_interval=1, patience=2))
    assert result.step == 6
    assert read_log(tmp_path)[-1]["final"] is True
    reason = "validation loss has not improved for 2 evaluations; best 1.9000 at step 4"
    assert f"stopped: {reason} (" in capsys.readouterr().out


def test_a_resume_keeps_the_gradient_scale(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed float16 run that starts with the initial scale or growth counter (bug 24)."""
    monkeypatch.setattr("gpt.training.step.autocast_dtype", lambda name, device: torch.float16)
    first = Trainer(make_model(data), data, replace(CONFIG, max_steps=2), out=tmp_path)
    first._step.scaler.load_state_dict(first._step.scaler.state_dict() | {"scale": 64.0})
    first.run()
    resumed = Trainer(make_model(data), data, CONFIG, out=tmp_path, resume=True)
    state = resumed._step.scaler.state_dict()
    assert state == first._step.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (64.0, 2)


def test_a_resume_keeps_the_best_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that counts patience from zero."""
    losses = iter([2.0, 3.0, 2.5])
    monkeypatch.setattr(Trainer, "estimate", lambda self, split: 0.0 if split == "train" else next(losses))
    config = replace(CONFIG, max_steps=9, eval_interval=1, patience=2)
    assert run(stop_at(TokenData.from_text(TEXT), 1), tmp_path, config).signal == signal.SIGINT
    assert run(TokenData.from_text(TEXT), tmp_path, config, resume=True).step == 3


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_non_finite_step_changes_nothing(what: str, data: TokenData, tmp_path: Path) -> None:
    """A NaN that reaches the parameters or the optimizer, or a failed step whose batches are lost."""
    trainer = Trainer(make_model(data), data, replace(CONFIG, max_steps=6), out=tmp_path)
    draw, step = trainer.data.batch, trainer._step

    def poison(stream: Any, *args: Any, **kwargs: Any) -> Batch:
        if stream == "train" and kwargs["step"] == 3 and "kept" not in state:
            state["kept"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            state["optimizer"] = {name: t.clone() for name, t in step.tensors().items()}
            if what == "loss":
                step._forward = lambda *a, **k: trainer.model(*a, **k) * math.inf
            else:
                trainer.model.wpe.weight.register_hook(lambda g: g * math.nan)
        return draw(stream, *args, **kwargs)

    state: dict[str, Any] = {}
    data.batch = poison  # type: ignore[method-assign]
    with pytest.raises(
        NonFiniteError,
        match=rf"^step 4: the {what} is (nan|inf); stopped before it changed anything, its batch is in",
    ):
        trainer.run()
    assert trainer.step == 3
    assert all(torch.equal(p, state["kept"][name]) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(t, state["optimizer"][name]) for name, t in step.tensors().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    kept = read_tensors(tmp_path / "non-finite-step-4.safetensors")
    for i in range(2):
        expected = draw("train", 2, 16, seed=CONFIG.seed, step=3, micro_step=i)
        assert torch.equal(kept[f"{i}/inputs"], expected.inputs)
        assert torch.equal(kept[f"{i}/targets"], expected.targets)
    assert checkpoint.find_checkpoint(tmp_path).name == "step-2"


def test_bfloat16_is_used(data: TokenData, tmp_path: Path) -> None:
    """A dtype that is accepted but not used, or parameters stored in bfloat16."""
    trainer = Trainer(make_model(data), data, replace(CONFIG, dtype="bfloat16", max_steps=2), out=tmp_path)
    assert trainer.precision == "bfloat16"
    full = Trainer(make_model(data), data, replace(CONFIG, dtype="float32")).estimate("train")
    assert trainer.estimate("train") != full
    assert trainer.estimate("train") == pytest.approx(full, rel=1e-2)
    trainer.run()
    assert trainer.model.wte.weight.dtype == torch.float32


def test_compile_is_used(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that does nothing, or a compiled model with parameters of its own."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    config = replace(CONFIG, max_steps=3, compile=True)
    trainer = Trainer(make_model(data, dropout=0.0), data, config)
    assert trainer._step._forward is not trainer.model
    compiled = trainer.run()
    assert compiled == Trainer(make_model(data, dropout=0.0), data, replace(config, compile=False)).run()


def test_wrong_settings_are_refused_early(data: TokenData, tmp_path: Path) -> None:
    """A wrong setting that is reported only after files are written."""
    for config, words in (
        (replace(CONFIG, dtype="float16"), "dtype is 'float16' on a CPU"),
        (replace(CONFIG, device="cpus"), "device is 'cpus'"),
        (replace(CONFIG, device="cuda:99"), "device is 'cuda:99'"),
    ):
        with pytest.raises(InputError, match=words):
            Trainer(make_model(data), data, config, out=tmp_path / "out")
    with pytest.raises(InputError, match="validation split has 600 tokens, expected at least 601"):
        Trainer(make_model(data, block_size=600), data, CONFIG, out=tmp_path / "out")
    model = GPT(GPTConfig(vocab_size=5, block_size=16, n_layer=1, n_head=1, n_embd=8), device="cpu")
    with pytest.raises(
        InputError, match=f"vocab_size is 5, expected at least the tokenizer's {data.tokenizer.vocab_size}"
    ):
        Trainer(model, data, CONFIG, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_objects_of_a_run_show_what_they_are(data: TokenData, tmp_path: Path) -> None:
    """`<gpt.training.trainer.Trainer object at 0x7f…>` in a notebook."""
    folder = RunFolder(tmp_path / "run")
    assert repr(folder) == f"RunFolder({str(folder.path)!r})"
    trainer = Trainer(make_model(data), data, CONFIG, out=folder)
    assert repr(trainer) == f"Trainer(step 0 of 8, float32 on cpu, out={str(folder.path)!r})"
