"""Each row of mutants, fuzz, limits, processes and kernels reports a failure when its promise is broken."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("resource", reason="needs Linux's fork and resource limits")

import kernels
from gpt.errors import InputError
from tests.scorecard import fuzz, kernel_mutants, limits, mutants, processes
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Refused, Say, answer, run_trials, same

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fork and resource limits")

ROWS = {row.name: row for m in (mutants, fuzz, limits, processes, kernel_mutants) for row in m.ROWS}
# The rows of files and inputs, without those whose valid files take long to make; all share the code.
QUICKLY_BUILT = [row.name for m in (mutants, fuzz) for row in m.ROWS]
for _slow in ("mutants-run", "mutants-third-party", "mutants-verdicts"):
    QUICKLY_BUILT.remove(_slow)


def outcome(name: str, trials: int, folder: Path, seed: int = 0) -> Outcome:
    return ROWS[name].run(trials, seed, folder / "row")


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


def nothing(*_: Any, **__: Any) -> None:
    pass


def test_rows_have_their_own_names_and_a_small_form() -> None:
    """Two rows of one name, or a row that the tests do not run."""
    rows = [row for m in (mutants, fuzz, limits, processes, kernel_mutants) for row in m.ROWS]
    assert len(ROWS) == len(rows)
    for row in rows:
        assert 0 < row.small <= row.trials <= row.long
    assert sum(row.long for row in rows if row.name.startswith("mutants-")) >= 10_000
    assert sum(row.long for row in rows if row.name.startswith("fuzz-")) >= 100_000


def _fail(say: Say) -> None:
    raise AssertionError("a promise is broken")


def _crash(say: Say) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(say: Say) -> None:
    signal.pause()


def _allocate(say: Say) -> None:
    bytearray(b"x") * (400 << 20)


def _run_code(say: Say) -> None:
    os.system("true")


def _raise(say: Say) -> None:
    answer(broken)


def _several_lines(say: Say) -> None:
    def refuse() -> None:
        raise InputError("one\ntwo")

    answer(refuse)


ATTACKS: dict[str, Callable[[Say], None]] = {
    "a promise is broken": _fail,
    "signal 11": _crash,
    "hangs": _hang,
    "MB for a file": _allocate,
    "runs code: os.system": _run_code,
    "RuntimeError at test_rows.py": _raise,
    "other than one line": _several_lines,
}


@pytest.mark.parametrize("symptom", ATTACKS)
def test_a_trial_that_breaks_a_promise_fails_alone(symptom: str) -> None:
    """A failure that is not counted, or that ends the trials after it."""

    def attack(number: int, say: Say) -> None:
        say(f"trial of {symptom}")
        if number == 1:
            ATTACKS[symptom](say)

    actual = run_trials(3, attack, limit=0.3)
    assert actual.trials == 3
    assert len(actual.failures) == 1
    assert f"trial of {symptom}" in actual.failures[0]
    assert symptom in actual.failures[0]


def test_a_slow_trial_fails() -> None:
    """A trial that takes too long, but ends before its process is killed."""
    actual = run_trials(1, lambda number, say: time.sleep(0.2), limit=0.1)
    assert len(actual.failures) == 1


@pytest.mark.parametrize("name", QUICKLY_BUILT)
def test_equal_seeds_make_equal_attacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that cannot be repeated."""
    named: list[list[str]] = []

    def stop_once_named(text: str) -> None:
        named[-1].append(text.replace(str(place), ""))
        raise AssertionError

    def record(trials: int, attack: Any, **options: Any) -> Outcome:
        named.append([])
        for number in range(trials):
            with pytest.raises(AssertionError):
                attack(number, stop_once_named)
        return Outcome(trials)

    for module in (mutants, fuzz):
        monkeypatch.setattr(module, "run_trials", record)
    place = tmp_path / "row"
    for _ in range(2):
        ROWS[name].run(6, 3, place)
        shutil.rmtree(place)
    assert named[0] == named[1]


EVERYTHING_IS_FINITE = SimpleNamespace(isfinite=lambda value: True)
# Row -> what is broken: the attribute, and what replaces it. The rows must notice within these trials.
SABOTAGE: dict[str, tuple[str, Any, int]] = {
    "mutants-checkpoint": ("gpt.weights.checkpoint.verify", nothing, 20),
    "mutants-run": ("gpt.weights.checkpoint.verify", nothing, 20),
    "mutants-token-cache": ("gpt.data.cache._hash", lambda name, file, length: _last(file, length), 20),
    "mutants-bins": ("gpt.data.bins.check_id", nothing, 20),
    "mutants-tokenizers": ("gpt.data.tokenizers.InputError", RuntimeError, 10),
    "fuzz-toml": ("tomllib.loads", broken, 1),
    "fuzz-flags": ("gpt.cli.convert", broken, 10),
    "fuzz-texts": ("gpt.data.tokenizers.BPETokenizer.decode", lambda self, ids: "x", 30),
    "fuzz-tokenizers": ("tests.scorecard.fuzz.load_tokenizer", broken, 2),
    "fuzz-safetensors": ("tests.scorecard.fuzz.read_weights", broken, 2),
    "fuzz-bins": ("gpt.data.bins.check_id", nothing, 20),
    "fuzz-jsonl": ("gpt.data.formats.json_object", broken, 1),
    "fuzz-pickles": ("gpt.weights.files.InputError", RuntimeError, 10),
    "fuzz-json": ("tests.scorecard.fuzz.read_json", lambda path: {"n_layer": 1 / 0}, 2),
    "fuzz-sums": ("gpt.weights.checkpoint.verify", nothing, 10),
    "fuzz-streams": ("gpt.data.text_stream.TextStream._add", lambda self, text: self.write(text), 30),
    "limits-out-of-memory": ("tests.scorecard.limits._run", lambda module, argv: (1, "broken"), 1),
    "non-finite-files": ("gpt.weights.tensors.math", EVERYTHING_IS_FINITE, 4),
    "threads": ("kernels.explain", lambda *_: kernels.dispatch.Choice("triton", ""), 1),
}


def _last(file: Any, length: int) -> bytes:
    """The hash that a file of the cache ends with."""
    file.seek(length)
    return os.pread(file.fileno(), 32, length)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_row_notices_broken_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that passes whatever the code does."""
    target, replacement, trials = SABOTAGE[name]
    monkeypatch.setattr(target, replacement)
    assert outcome(name, trials, tmp_path).failures


def test_a_poisoned_optimizer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite second moment in AdamW, which freezes a weight and leaves every loss finite."""

    def plant(place: str, value: float, run: Any, *_: Any) -> None:
        moments = [t for name, t in run._step.tensors().items() if name.endswith("exp_avg_sq")]
        moments[0].view(-1)[0] = torch.inf

    monkeypatch.setattr(limits, "_plant", plant)
    monkeypatch.setattr("gpt.weights.tensors.math", EVERYTHING_IS_FINITE)
    assert outcome("non-finite-training", 1, tmp_path, seed=128).failures  # with AdamW, at step 4


def test_an_export_without_its_hashes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a Hugging Face export that load without a look at SHA256SUMS."""
    for place in ("gpt.weights.files", "gpt.weights.pretrained"):
        monkeypatch.setattr(f"{place}.verify_listed", nothing, raising=False)
    assert outcome("mutants-export", 40, tmp_path).failures


def test_weights_that_are_not_finite_are_noticed() -> None:
    """A third-party file with NaN that is accepted."""
    mutants.refused_or_finite(Refused("refused"), None)
    mutants.refused_or_finite({"tensors": {"a": torch.ones(2)}}, None)
    with pytest.raises(AssertionError, match="a is not finite"):
        mutants.refused_or_finite({"tensors": {"a": torch.tensor([1.0, torch.nan])}}, None)


def test_a_load_that_takes_too_much_memory_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that holds three copies of a file."""
    monkeypatch.setattr(limits, "SIZE", 1 << 20)
    monkeypatch.setattr(limits, "LOADS", (lambda folder: _greedy(folder),))
    assert outcome("limits-memory", 1, tmp_path).failures


def _greedy(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    return lambda: bytearray(b"x") * (300 << 20)


def test_a_rank_that_differs_and_is_not_refused_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks with two learning rates that both exit with 0."""
    monkeypatch.setattr("gpt.train.main", lambda argv: 0)
    assert outcome("torchrun", 1, tmp_path).failures
    assert outcome("torchrun", 1, tmp_path, seed=10).failures == []  # a trial without a fault


@pytest.mark.interpreter
def test_kernel_mutants_are_sound(tmp_path: Path) -> None:
    """Mutants that are no source, that equal it, or that are not told apart."""
    everything = kernel_mutants.mutants()
    assert len(everything) > 2000
    for mutant in everything[::50]:
        compile(mutant.source, mutant.file, "exec")
        assert mutant.source != (kernel_mutants.FOLDER / mutant.file).read_text("utf-8")
    keys = [mutant.key for mutant in everything]
    for known in kernel_mutants.EQUIVALENT:
        assert any(key.startswith(known) for key in keys), f"an equivalent mutant that is no more: {known}"
    small = kernel_mutants.sample(everything, 5, 0)
    assert small == kernel_mutants.sample(everything, 50, 0)[:5]


@pytest.mark.interpreter
def test_mutants_that_no_check_kills_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that kill nothing."""
    monkeypatch.setattr(kernel_mutants, "kernel_checks", lambda *_: [])
    monkeypatch.setattr(kernel_mutants, "reference_checks", lambda *_: [])
    assert outcome("kernel-mutants", 3, tmp_path).failures


@pytest.mark.interpreter
@pytest.mark.parametrize("file", ["ffn/gelu.py", "ffn/reference.py"])
def test_unmodified_sources_survive(file: str, tmp_path: Path) -> None:
    """Checks that fail for any source, and so seem to kill every mutant."""
    source = (kernel_mutants.FOLDER / file).read_text("utf-8")
    unmodified = kernel_mutants.Mutant(file, "ffn", 1, "nothing", source)

    def attack(number: int, say: Say) -> None:
        assert kernel_mutants.kill(unmodified, tmp_path) == ""

    assert run_trials(1, attack, limit=60, alone=True).failures == []


def test_results_are_compared_bit_by_bit() -> None:
    """Two results that differ in a bit, a dtype or a key and count as the same."""
    a = {"x": torch.tensor([0.0, torch.nan]), "n": [1, "a"]}
    assert same(a, {"x": torch.tensor([0.0, torch.nan]), "n": [1, "a"]})
    assert not same(a, {"x": torch.tensor([-0.0, torch.nan]), "n": [1, "a"]})
    assert not same(a, {"x": torch.tensor([0.0, torch.nan]).double(), "n": [1, "a"]})
    assert not same(a, {"x": torch.tensor([0.0, torch.nan]), "n": [True, "a"]})
    assert not same(a, {"x": a["x"]})


def test_rows_are_rows() -> None:
    """A module whose rows the scorecard cannot run."""
    assert all(isinstance(row, Row) for row in ROWS.values())
