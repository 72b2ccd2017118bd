"""Rows that damage files of every kind and load them: nothing damaged may pass for the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from gpt import GPT, GPTConfig, TokenData, Trainer
from gpt.data.dataset import DataConfig, save_bin
from gpt.data.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer
from gpt.training.run_folder import LOG, RunFolder
from gpt.weights import checkpoint
from gpt.weights.pretrained import load_pretrained, load_pretrained_tokenizer
from tests.gpt.text import TEXT
from tests.gpt.training import small_runs
from tests.gpt.weights.layouts import BookGPT, H, NanoGPT, randomise
from tests.scorecard.mutators import damage
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Refused, Say, answer, quick_ends, random_of, run_trials, same, variables

PHRASE = "the cat sat on his old red mat\n"
CONFIG = GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=2, n_embd=8)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Of the row, after "mutants-".
        promise: What the row promises.
        build: Writes valid files into an empty folder, with other content for another number.
        load: Loads them; what it returns is compared.
        judge: Raises AssertionError unless what a load returned is allowed, given what the original gives.
        small, trials, long: As in Row.
    """

    name: str
    promise: str
    build: Callable[[Path, int], None]
    load: Callable[[Path], Any]
    judge: Callable[[Any, Any], None]
    small: int
    trials: int
    long: int

    def row(self) -> Row:
        return Row(
            name=f"mutants-{self.name}",
            promise=self.promise,
            run=partial(_run, self),
            trials=self.trials,
            small=self.small,
            long=self.long,
        )


def _run(kind: Kind, trials: int, seed: int, folder: Path) -> Outcome:
    original, other, victim = folder / "original", folder / "other", folder / "victim"
    for number, place in enumerate((original, other)):
        place.mkdir(parents=True)
        kind.build(place, number)
    expected = kind.load(_copied(original, victim))  # from the victim's path, as in each trial

    def attack(number: int, say: Say) -> int:
        rng = random_of(kind.name, seed, number)
        path = rng.choice(sorted(p for p in _copied(original, victim).rglob("*") if p.is_file()))
        size, name = path.stat().st_size, path.relative_to(victim)
        counterpart = other / name
        how = damage(path, rng, counterpart if counterpart.is_file() else None)
        say(f"{name} {how}")
        kind.judge(answer(lambda: kind.load(victim)), expected)
        return size

    return run_trials(trials, attack)


def _copied(source: Path, target: Path) -> Path:
    if target.is_symlink() or target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target


def refused_or_equal(value: Any, expected: Any) -> None:
    """The promise for files with a hash."""
    if not isinstance(value, Refused):
        assert same(value, expected), f"accepted with other content: {_difference(value, expected)}"


def equal(value: Any, expected: Any) -> None:
    """The promise for a cache, which can be rebuilt."""
    assert not isinstance(value, Refused), f"not rebuilt: {value}"
    refused_or_equal(value, expected)


def refused_or_finite(value: Any, expected: Any) -> None:
    """The promise for weights without a hash."""
    if not isinstance(value, Refused):
        for name, tensor in value["tensors"].items():
            assert bool(torch.isfinite(tensor).all()), f"{name} is not finite, and is accepted"


def refused_or_sound(value: Any, expected: Any) -> None:
    """The promise for ids and tokenizers without a hash; `load` has used what it loaded."""


def _difference(value: Any, expected: Any) -> str:
    if isinstance(value, dict) and isinstance(expected, dict):
        names = [n for n in expected if n not in value or not same(value[n], expected[n])]
        return ", ".join(map(str, names[:3])) or "more entries"
    return type(value).__name__


def _tokenizer(number: int) -> BPETokenizer:
    return BPETokenizer.train(TEXT[:2000] if number else TEXT[-2000:], 300)


def _model(number: int) -> GPT:
    torch.manual_seed(number)
    return GPT(CONFIG, device="cpu")


def _build_checkpoint(folder: Path, number: int) -> None:
    checkpoint.save_model(_model(number), folder, _tokenizer(number))


def _build_export(folder: Path, number: int) -> None:
    from gpt.weights.huggingface import save_huggingface

    save_huggingface(_model(number), folder, _tokenizer(number))


def _load(folder: Path, config: Any = None) -> dict[str, Any]:
    model = load_pretrained(folder, config, device="cpu")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return {"tensors": tensors, "config": model.config.to_dict()}


def _load_with_tokenizer(folder: Path) -> dict[str, Any]:
    return _load(folder) | {"tokenizer": load_pretrained_tokenizer(folder).to_json()}


def _data(number: int = 0) -> TokenData:
    return TokenData.from_text(TEXT[number:])


def _build_run(folder: Path, number: int) -> None:
    from dataclasses import replace

    config = replace(small_runs.CONFIG, max_steps=4, seed=number)
    with quick_ends():
        small_runs.run(_data(), folder, config)


def _load_run(folder: Path) -> dict[str, Any]:
    data = _data()
    torch.manual_seed(0)
    trainer = Trainer(small_runs.make_model(data), data, small_runs.CONFIG, out=folder, resume=True)
    RunFolder(folder).prepare(trainer.step, keep_final=False)
    records = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    assert all(record["step"] <= trainer.step for record in records), "the log is ahead of the run"
    return {
        "step": trainer.step,
        "tensors": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "optimizer": {name: t.clone() for name, t in trainer._step.tensors().items()},
        "random": torch.get_rng_state(),
    }


def _judge_run(value: Any, expected: Any) -> None:
    """The state of a run is that of its newest checkpoint, or of the one before."""
    if isinstance(value, Refused):
        return
    states = {state["step"]: state for state in expected}
    assert value["step"] in states, f"resumed at step {value['step']}"
    refused_or_equal(value, states[value["step"]])


def _run_run(kind: Kind, trials: int, seed: int, folder: Path) -> Outcome:
    """As `_run`; what is expected are the states of both checkpoints."""
    original, other, victim = folder / "original", folder / "other", folder / "victim"
    for number, place in enumerate((original, other)):
        _build_run(place, number)
    expected = [_load_run(_copied(original, victim))]
    shutil.rmtree(max(checkpoint.list_checkpoints(victim), key=checkpoint.step_of))
    expected.append(_load_run(victim))

    def attack(number: int, say: Say) -> int:
        rng = random_of(kind.name, seed, number)
        files = [p for p in _copied(original, victim).rglob("*") if p.is_file()]
        path = rng.choice(sorted(p for p in files if p.name == LOG or checkpoint.FOLDER in p.parts))
        size, counterpart = path.stat().st_size, other / path.relative_to(victim)
        how = damage(path, rng, counterpart if counterpart.is_file() else None)
        say(f"{path.relative_to(victim)} {how}")
        _judge_run(answer(lambda: _load_run(victim)), expected)
        return size

    return run_trials(trials, attack)


def _build_third_party(folder: Path, number: int) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(number)
    nano = randomise(NanoGPT())
    for name in ("nano", "book", "shards", "export"):
        (folder / name).mkdir()
    torch.save(
        {"model": nano.state_dict(), "model_args": nano.arguments, "iter_num": 5}, folder / "nano/ckpt.pt"
    )
    torch.save(randomise(BookGPT()).state_dict(), folder / "book/model.pth")
    _build_export(folder / "export", number)
    (folder / "export" / checkpoint.SUMS).unlink()
    tensors = checkpoint.read_tensors(folder / "export" / checkpoint.MODEL)
    names = sorted(tensors)
    places = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == place}, folder / "shards" / place)
    index = {"metadata": {}, "weight_map": places}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(folder / "export" / checkpoint.CONFIG, folder / "shards" / checkpoint.CONFIG)


def _load_third_party(folder: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    refused = 0
    for name, config in (("nano", None), ("book", {"n_head": H}), ("shards", None), ("export", None)):
        value = answer(partial(_load, folder / name, config))
        refused += isinstance(value, Refused)
        if not isinstance(value, Refused):
            tensors |= {f"{name}/{key}": tensor for key, tensor in value["tensors"].items()}
    assert refused <= 1, "an undamaged folder is refused"
    tokenizer = answer(lambda: load_pretrained_tokenizer(folder / "export"))
    if not isinstance(tokenizer, Refused):
        _use(tokenizer)
    return {"tensors": tensors}


def _texts(folder: Path, number: int) -> list[Path]:
    """Two documents; the same names and sizes for each number."""
    paths = []
    for i in range(2):
        path = folder / f"{i}.txt"
        path.write_text(TEXT[i * 1000 + number : (i + 1) * 1000 + number], encoding="utf-8")
        paths.append(path)
    return paths


def _load_cached(folder: Path) -> dict[str, Any]:
    """The tokens of `_texts` from the cache in `folder`; the texts are outside of it."""
    texts = sorted(str(path) for path in (folder.parent / "texts").iterdir())
    with variables(FUSED_GPT_CACHE=str(folder)):
        data = TokenData.load(DataConfig(data=tuple(texts), pack_documents=True))
        batch = data.batch("train", 4, 16, seed=1, step=1)
    return {"tokens": data.all_tokens().tolist(), "batch": list(batch), "identity": data.identity}


def _build_cache(folder: Path, number: int) -> None:
    """The cache of two texts; that of number 1 has the names of number 0's files."""
    texts = folder.parent / "texts"
    texts.mkdir(exist_ok=True)
    _texts(texts, 0)
    _load_cached(folder)
    if number:
        names = sorted(p for p in folder.rglob("*") if p.is_file())
        _texts(texts, 1)
        _load_cached(folder)
        later = sorted(p for p in folder.rglob("*") if p.is_file() and p not in names)
        assert len(names) == len(later), "the cache of one text has other files than that of another"
        for target in names:
            source = next(p for p in later if p.suffix == target.suffix)
            source.replace(target)
        _texts(texts, 0)


def _build_bins(folder: Path, number: int) -> None:
    save_bin(_data(number), folder)


def _load_bins(folder: Path) -> None:
    """Loads .bin files and uses every id, as training and evaluation do."""
    data = TokenData.load(DataConfig(data=(str(folder),)))
    data.check(8)
    for step in range(3):
        data.batch("train", 2, 8, seed=1, step=step)
    for split in ("train", "validation"):
        largest = int(data.tokens(split).max())
        assert largest < data.tokenizer.vocab_size, f"the {split} split has id {largest}, and is accepted"
    data.bigram_loss()


def _build_tokenizers(folder: Path, number: int) -> None:
    for name in ("bpe", "characters", "merges"):
        (folder / name).mkdir()
    tokenizer = _tokenizer(number)
    tokenizer.save(folder / "bpe")
    CharTokenizer.train(TEXT[number:]).save(folder / "characters")
    merges = tokenizer.to_json()["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges/merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load_tokenizers(folder: Path) -> None:
    for path in (folder / "bpe", folder / "characters", folder / "merges/merges.txt"):
        tokenizer = answer(partial(load_tokenizer, path))
        if not isinstance(tokenizer, Refused):
            _use(tokenizer)


def _use(tokenizer: Any) -> None:
    """A loaded tokenizer gives a text back; one of characters may lack some of them."""
    ids = answer(lambda: tokenizer.encode(PHRASE))
    if not isinstance(ids, Refused):
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids), f"ids {ids[:8]}"
        assert tokenizer.decode(ids) == PHRASE, "the text comes back as another one"
    elif isinstance(tokenizer, BPETokenizer):
        raise AssertionError(f"a byte-level tokenizer refuses plain text: {ids}")
    answer(lambda: json.dumps(tokenizer.to_json()))


VERDICT_CASES = [("layer_norm", kernels.Case({"N": 2, "C": 4}))]


def _load_verdicts(folder: Path) -> dict[str, Any]:
    with variables(FUSED_GPT_CACHE=str(folder)):
        report = kernels.preflight(VERDICT_CASES, "cpu", torch.float32)
    str(report)
    return {"ops": [(row.op, row.case) for row in report.rows], "failed": report.failed, "ok": report.ok}


def _build_verdicts(folder: Path, number: int) -> None:
    _load_verdicts(folder)


KINDS = (
    Kind(
        name="checkpoint",
        promise="a damaged checkpoint of ours is refused in one line, or loads as the original bit by bit",
        build=_build_checkpoint,
        load=_load_with_tokenizer,
        judge=refused_or_equal,
        small=40,
        trials=400,
        long=3000,
    ),
    Kind(
        name="run",
        promise="a damaged run resumes from a checkpoint exactly as it was saved, or is refused in one line",
        build=_build_run,
        load=_load_run,
        judge=_judge_run,
        small=24,
        trials=150,
        long=2000,
    ),
    Kind(
        name="export",
        promise="a damaged Hugging Face export is refused in one line, or loads as the original bit by bit",
        build=_build_export,
        load=_load_with_tokenizer,
        judge=refused_or_equal,
        small=40,
        trials=400,
        long=2000,
    ),
    Kind(
        name="third-party",
        promise="a damaged file without a hash (nanoGPT, the book, shards) is refused in one line, or its "
        "weights are finite; it runs no code",
        build=_build_third_party,
        load=_load_third_party,
        judge=refused_or_finite,
        small=12,
        trials=200,
        long=2000,
    ),
    Kind(
        name="token-cache",
        promise="a damaged token cache is rebuilt: the tokens, documents and batches are those of the text",
        build=_build_cache,
        load=_load_cached,
        judge=equal,
        small=40,
        trials=300,
        long=2000,
    ),
    Kind(
        name="bins",
        promise="damaged .bin files or their tokenizer are refused in one line, or every id is valid",
        build=_build_bins,
        load=_load_bins,
        judge=refused_or_sound,
        small=40,
        trials=300,
        long=2000,
    ),
    Kind(
        name="tokenizers",
        promise="a damaged tokenizer.json or merges.txt is refused in one line, or encodes text and gives "
        "it back",
        build=_build_tokenizers,
        load=_load_tokenizers,
        judge=refused_or_sound,
        small=40,
        trials=300,
        long=2000,
    ),
    Kind(
        name="verdicts",
        promise="a damaged preflight cache is rebuilt, or gives the verdict of the check",
        build=_build_verdicts,
        load=_load_verdicts,
        judge=equal,
        small=10,
        trials=60,
        long=500,
    ),
)

ROWS: tuple[Row, ...] = tuple(
    kind.row()
    if kind.name != "run"
    else Row("mutants-run", kind.promise, partial(_run_run, kind), kind.trials, kind.small, kind.long)
    for kind in KINDS
)
