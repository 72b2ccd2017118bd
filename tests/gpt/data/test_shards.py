"""Folders of many .bin files: forms, splits, identity, the order of windows, documents, damage, and size."""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt import GPT, DataConfig, GPTConfig, InputError, TokenData, TrainConfig, Trainer
from gpt.data import shards
from gpt.data.dataset import IGNORED, Batch, save_bin
from gpt.data.shards import MAPS, Shards, permuted, shuffled
from gpt.data.token_files import HEADER
from tests.gpt.data.loading import BINS, load
from tests.gpt.data.test_dataset import assert_cuts_are_equal

MAGIC, LLAMA = (20240520, 1), (20240801, 7)
SIZES = (41, 9, 8, 30, 17)  # of the shards, in ids; block_size 8 leaves no window in the third


def write_shard(
    path: Path, ids: Any, form: tuple[int, int] | None = MAGIC, number: int | None = None
) -> None:
    """Writes ids as llm.c does, or with `form` None as nanoGPT does. `number` is what the header states."""
    header = np.zeros(256, "<i4")
    header[:3] = *(form or MAGIC), len(ids) if number is None else number
    dtype = "<u4" if form == LLAMA else "<u2"
    path.write_bytes((b"" if form is None else header.tobytes()) + np.asarray(ids, dtype).tobytes())


def write_shards(folder: Path, form: tuple[int, int] | None = MAGIC, sizes: Any = SIZES) -> list[int]:
    """Writes shards for training and one to validate, with llm.c's names; returns the ids to train on."""
    folder.mkdir(exist_ok=True)
    BINS.save(folder)
    ids = np.random.default_rng(0).integers(0, 256, sum(sizes)).tolist()
    bounds = np.cumsum([0, *sizes]).tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        write_shard(folder / f"fineweb_train_{i + 1:06d}.bin", ids[begin:end], form)
    write_shard(folder / "fineweb_val_000000.bin", ids[:50], form)
    return ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards")
    return tmp_path / "shards"


def epoch(data: TokenData, number: int, batch_size: int = 1, seed: int = 3) -> list[tuple[int, ...]]:
    """The rows of an epoch of windows of 8, and their last targets, drawn in batches."""
    tokens = data.tokens("train")
    assert isinstance(tokens, Shards)
    count = tokens.windows(8)
    assert count % batch_size == 0
    steps = range(number * count // batch_size, (number + 1) * count // batch_size)
    batches = [data.batch("train", batch_size, 8, seed=seed, step=step) for step in steps]
    return [
        (*x.tolist(), int(y[-1]))
        for batch in batches
        for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]


@pytest.mark.parametrize("form", [None, MAGIC, LLAMA], ids=["nanogpt", "llm.c", "llama-3"])
def test_every_form_has_the_same_tokens(form: tuple[int, int] | None, tmp_path: Path) -> None:
    """A header that is read as tokens, ids of another width, or files in another order than their names."""
    ids = write_shards(tmp_path / "all", form)
    data = load(tmp_path / "all")
    tokens, positions = data.tokens("train"), np.array([[104, 0, 41], [40, 50, 87]])
    assert (len(tokens), tokens.tolist(), data.tokens("validation").tolist()) == (105, ids, ids[:50])
    assert tokens[positions].tolist() == np.array(ids)[positions].tolist()
    assert tokens[30:70][5:30].tolist() == ids[35:60]
    assert tokens[70:30].tolist() == []
    assert data.all_tokens().tolist() == ids + ids[:50]
    assert data.all_targets().tolist() == [True] * 155
    assert repr(data).startswith("TokenData(105 tokens to train on, 50 to validate")
    assert repr(tokens) == "Shards(105 ids)"

    one = load(tmp_path / "all" / "fineweb_train_000001.bin")
    assert [*one.tokens("train").tolist(), *one.tokens("validation").tolist()] == ids[:41]
    save_bin(data, tmp_path / "saved")
    assert load(tmp_path / "saved").tokens("train").tolist() == ids


def test_each_window_is_seen_once_in_an_epoch(folder: Path) -> None:
    """A window that crosses into the next file, is left out or seen twice, or is in the same order again."""
    data = load(folder)
    ids, position, windows = data.tokens("train").tolist(), 0, []
    for size in SIZES:
        windows += [tuple(ids[i : i + 9]) for i in range(position, position + size - 8, 8)]
        position += size
    assert len(set(windows)) == len(windows) == 5 + 1 + 0 + 3 + 2
    epochs = [epoch(data, number) for number in range(4)]
    for rows in epochs:
        assert sorted(rows) == sorted(windows)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert epoch(data, 2, batch_size=11) == epochs[2]
    assert epoch(load(folder), 2) == epochs[2]
    assert epoch(data, 2, seed=4) != epochs[2]
    spanning = data.batch("train", 30, 8, seed=3, step=0).inputs[:, :8].tolist()
    assert spanning == [list(row[:-1]) for rows in epochs for row in rows][:30]


def test_a_step_of_shards_is_the_same_however_it_is_cut(folder: Path) -> None:
    """Accumulation or more processes that see other windows, or one window twice in a step."""
    assert_cuts_are_equal(load(folder), 8)
    assert_cuts_are_equal(load(folder, pack_documents=True), 8)


def test_random_windows_of_shards_stay_in_a_file(folder: Path) -> None:
    """Estimates over windows of two files, or over the order of training."""
    data = load(folder)
    windows = {row[:-1] for row in epoch(data, 0)}
    rows = data.batch("estimate", 500, 8, seed=0, step=0).inputs.tolist()
    assert {tuple(row) for row in rows} == windows
    assert len(data.batch("validation", 5, 8, seed=0, step=0).inputs) == 5
    targets = torch.cat(
        [batch.targets[batch.targets != IGNORED] for batch in data.windows("validation", 2, 8)]
    )
    assert targets.tolist() == data.tokens("validation").tolist()[1:]


def test_permutations_are_exact() -> None:
    """A number that a permutation has twice or never."""
    for n in (*range(1, 70), 1000, 4097, 65_536):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, 5, 1)), np.arange(n)), n
    n = 3 * 10**11 + 7  # 600 TB of ids in windows of 1024
    far = permuted(np.arange(n - 1000, n), n, 5, 1)
    assert len(set(far.tolist())) == 1000
    assert far.min() >= 0
    assert far.max() < n
    assert far.max() - far.min() > 0.99 * n
    assert shuffled(10**15 * n + 5, 3, n, 5).tolist() == permuted(np.arange(5, 8), n, 5, 10**15).tolist()


def test_permutations_are_uniform() -> None:
    """An order that favours some windows early in an epoch, or keeps neighbours together."""
    for n in (2, 5, 6):
        orders = [permuted(np.arange(n), n, seed, 0).tolist() for seed in range(600)]
        for cells, counts in (
            (n * (n - 1), Counter((order[0], order[-1]) for order in orders)),
            (n, Counter(order[n // 2] for order in orders)),
        ):
            expected = len(orders) / cells
            chi2 = sum(count**2 for count in counts.values()) / expected - len(orders)
            assert chi2 < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5, (n, counts)
    order = permuted(np.arange(100_000), 100_000, 0, 0)
    steps = np.diff(order) % 100_000
    assert np.abs(np.bincount(steps // 10_000) - 10_000).max() < 500
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_splits_follow_names_and_flags(folder: Path, tmp_path: Path) -> None:
    """Validation tokens that are trained on, or a file that is in no split."""
    ids = load(folder).tokens("train").tolist()
    write_shards(tmp_path / "other")
    both = load(folder, validation=(str(tmp_path / "other"),))
    assert both.tokens("train").tolist() == ids + ids[:50]
    assert both.tokens("validation").tolist() == ids + ids[:50]
    one = load(folder, validation=(str(tmp_path / "other" / "fineweb_val_000000.bin"),))
    assert one.tokens("validation").tolist() == ids[:50]
    with pytest.raises(InputError, match=r"shards with validation stdlib, expected \.bin files for each"):
        load(folder, validation=("stdlib",))

    (folder / "fineweb_val_000000.bin").unlink()
    (folder / "._hidden.bin").write_bytes(b"a")
    (folder / "README.md").write_text("notes")
    data = load(folder, validation_fraction=0.3)
    assert [data.tokens(split).tolist() for split in ("train", "validation")] == [ids[:73], ids[73:]]
    assert len(set(epoch(data, 0))) == 5 + 1 + 0 + (73 - 58 - 1) // 8
    whole = TokenData.load(DataConfig((str(folder),)), split=False)
    assert whole.all_tokens().tolist() == ids
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.txt").write_text("text")
    with pytest.warns(UserWarning, match="5 binary"):
        assert isinstance(load(folder).tokens("train"), np.ndarray)


def test_the_identity_shows_another_set_of_files(folder: Path) -> None:
    """A resume on files that were replaced, renamed, or moved between the splits."""
    first, path = load(folder).identity, folder / "fineweb_train_000004.bin"
    assert load(folder).identity == first
    assert load(folder, validation=(str(folder),)).identity != first
    content = path.read_bytes()
    for changed in (content[:-2], content[:-1] + b"\1", content[:HEADER] + b"\7" + content[HEADER + 1 :]):
        write = bytearray(changed)
        write[8:12] = ((len(changed) - HEADER) // 2).to_bytes(4, "little")
        path.write_bytes(write)
        assert load(folder).identity != first
    path.write_bytes(content)
    assert load(folder).identity == first
    path = folder / "fineweb_train_000005.bin"
    path.rename(folder / "fineweb_train_000009.bin")  # in the same place of the order
    assert load(folder).identity != first


def test_documents_of_shards_are_found_as_they_are_drawn(tmp_path: Path) -> None:
    """A document whose start is off by one, or that reads or predicts across <|endoftext|>."""
    BINS.save(tmp_path)
    write_shard(tmp_path / "a_train.bin", [256, 1, 2, 256, 3, 256, 256, 4, 5])
    write_shard(tmp_path / "b_train.bin", [6, 7, 256, 8, 9, 10, 11, 12, 256])
    write_shard(tmp_path / "val.bin", [1, 2, 256, 3, 4, 256, 5])
    data = load(tmp_path, pack_documents=True)
    batch = data.batch("train", 2, 8, seed=0, step=0)
    assert batch.document_start is not None
    assert batch.document_start.dtype == torch.int32
    first = batch.inputs[:, 0].tolist().index(256)
    assert batch.document_start[first].tolist() == [0, 1, 1, 1, 4, 4, 6, 7]
    assert batch.targets[first].tolist() == [IGNORED, 2, 256, IGNORED, 256, IGNORED, IGNORED, 5]
    assert batch.document_start[1 - first].tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    assert batch.targets[1 - first].tolist() == [7, 256, IGNORED, 9, 10, 11, 12, 256]

    (window,) = data.windows("validation", 1, 8)
    assert window.document_start[0, :7].tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert window.targets[0].tolist() == [2, 256, IGNORED, 4, 256, IGNORED, IGNORED, IGNORED]
    pairs = [pair for a, b in data._pairs("validation") for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert pairs == [(1, 2), (2, 256), (3, 4), (4, 256)]
    assert data.bigram_loss() == data.bigram_loss(data.windows("validation", 1, 8))


def test_the_bigram_loss_counts_a_bounded_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that reads hundreds of gigabytes, or only their begin."""
    data = load(folder)
    monkeypatch.setattr("gpt.data.dataset.CHUNK", 10)
    whole, ids = data.bigram_loss(), data.tokens("train").tolist()
    monkeypatch.setattr("gpt.data.dataset.BIGRAM_CHUNKS", 3)
    chunks = [(a.tolist(), b.tolist()) for a, b in data._pairs("train")]
    assert chunks == [(ids[i : i + 10], ids[i + 1 : i + 11]) for i in (0, 30, 70)]
    assert data.bigram_loss() != whole


def damage(folder: Path, kind: str) -> None:
    path = folder / "fineweb_train_000002.bin"
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "odd":
        path.write_bytes(b"abc")
    elif kind in ("truncated", "longer"):
        path.write_bytes(content[:-4] if kind == "truncated" else content + b"ab")
    elif kind == "header alone":
        write_shard(path, [])
    elif kind == "half a header":
        path.write_bytes(content[:100])
    elif kind == "version":
        write_shard(path, [1] * 9, (20240520, 2))
    elif kind == "wide":
        write_shard(path, [1] * 9, LLAMA)
    elif kind == "raw":
        write_shard(path, [1] * 9, None)
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "has 0 bytes, expected uint16 ids"),
        ("odd", "has 3 bytes, expected uint16 ids"),
        ("truncated", "has 1038 bytes, expected 1042, as its header states 9 ids"),
        ("longer", "has 1044 bytes, expected 1042, as its header states 9 ids"),
        ("header alone", "has 1024 bytes, expected 1024, as its header states 0 ids"),
        ("half a header", "has 100 bytes, expected 1042"),
        ("version", "has llm.c's header of version 2, expected 1"),
        ("wide", "has uint32 ids after a header, expected uint16 ids after a header, as .*000001.bin has"),
        ("raw", "has uint16 ids alone, expected uint16 ids after a header, as .*000001.bin has"),
        ("folder", "is a folder, expected a regular file"),
        ("dangling", "No such file"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(kind: str, message: str, folder: Path) -> None:
    """A traceback, or a file that is read up to its damage."""
    damage(folder, kind)
    with pytest.raises(InputError, match=rf"000002\.bin:? ?{message}|000002\.bin: {message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_single_file_is_refused_likewise(folder: Path) -> None:
    """One .bin file whose header is taken for tokens, because only folders are checked."""
    damage(folder, "truncated")
    with pytest.raises(InputError, match=r"000002\.bin has 1038 bytes, expected 1042"):
        load(folder / "fineweb_train_000002.bin")


def test_ids_are_checked_as_they_are_drawn(folder: Path) -> None:
    """An id beyond the vocabulary that ends a run in the embedding, or an error without its place."""
    write_shard(folder / "fineweb_train_000004.bin", [1] * 12 + [300] + [1] * 17)
    data, message = load(folder), r"000004\.bin has id 300 at position 12, expected 0 to 256"
    with pytest.raises(InputError, match=message):
        epoch(data, 0)
    with pytest.raises(InputError, match=message):
        data.all_tokens()
    with pytest.raises(InputError, match=message):
        data.bigram_loss()


def test_a_shard_that_changes_during_a_run_is_refused(folder: Path) -> None:
    """A killed process (SIGBUS) where a mapped file was truncated, or tokens of another file."""
    data, path = load(folder), folder / "fineweb_train_000001.bin"
    epoch(data, 0)
    os.truncate(path, 1024 + 20)
    with pytest.raises(InputError, match=r"000001\.bin has 1044 bytes, expected 1106, as at the start"):
        epoch(data, 0)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*000001\.bin: No such file"):
        epoch(data, 0)


def test_what_cannot_be_read_at_once_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of gigabytes that are copied into memory, or a split that has no window."""
    data = load(folder)
    data.check(8)
    with pytest.raises(
        InputError, match="train split has 41 tokens in its longest file, expected at least 42"
    ):
        data.check(41)
    monkeypatch.setattr(shards, "LIMIT", 100)
    for action in (data.all_tokens, lambda: save_bin(data, folder / "out")):
        with pytest.raises(InputError, match="shards has 105 tokens, expected at most 100 to read at once"):
            action()


def test_training_sees_each_window_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps whose sequences overlap under accumulation, or a resume that repeats or skips some of them."""
    drawn: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    batch = TokenData.batch

    def recorded(self: TokenData, stream: Any, *args: Any, **kwargs: Any) -> Batch:
        result = batch(self, stream, *args, **kwargs)
        if stream == "train":
            rows = [(*x.tolist(), int(y[-1])) for x, y in zip(*result[:2], strict=True)]
            drawn[kwargs["step"], kwargs["micro_step"]] = rows
        return result

    write_shard(folder / "fineweb_train_000003.bin", list(range(9)))  # a twelfth window
    data, config = (
        load(folder),
        TrainConfig(batch_size=3, grad_accum=2, seed=3, device="cpu", eval_interval=9),
    )
    expected = epoch(data, 0, batch_size=6) + epoch(data, 1, batch_size=6)
    monkeypatch.setattr(TokenData, "batch", recorded)
    for steps in (1, 4):
        model = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8), use_triton=False)
        config = replace(config, max_steps=steps)
        Trainer(model, data, config, out=tmp_path / "run", resume=steps > 1).run()
    assert [row for key in sorted(drawn) for row in drawn[key]] == expected

    write_shard(folder / "fineweb_train_000003.bin", list(range(1, 10)))
    with pytest.raises(InputError, match="the text or the tokenizer is not the one"):
        Trainer(model, load(folder), config, out=tmp_path / "run", resume=True)


def test_many_files_need_few_open_ones(tmp_path: Path) -> None:
    """A run that ends at the limit on open files, with more files than that."""
    resource = pytest.importorskip("resource", reason="Windows has no limit to set")
    ids = write_shards(tmp_path / "many", sizes=[9] * 3 * MAPS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + MAPS + 20, limits[1]))
    try:
        data = load(tmp_path / "many")
        assert data.tokens("train").tolist() == ids
        assert len(set(epoch(data, 0, batch_size=MAPS))) == 3 * MAPS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_hundreds_of_gigabytes_open_at_once(tmp_path: Path) -> None:
    """A start that reads or holds something for each token, or positions that overflow 32 bits."""
    BINS.save(tmp_path)
    count, size = 100, 10**9  # 200 GB
    header = np.array([*MAGIC, size], "<i4").tobytes()
    for i in range(count):
        path = tmp_path / f"fineweb_train_{i:06d}.bin"
        path.write_bytes(header)
        os.truncate(path, HEADER + 2 * size)
    if sum(path.stat().st_blocks for path in tmp_path.glob("*.bin")) * 512 > 10**9:
        pytest.skip("the file system has no sparse files")
    marked = np.arange(1, 10, dtype="<u2")
    with path.open("r+b") as file:
        file.seek(HEADER + 2 * (size - 1 - (size - 1) % 8 - 8))
        file.write(marked.tobytes())  # the last window of the last file

    tracemalloc.start()
    started = time.perf_counter()
    data = load(tmp_path, validation=(str(path),))
    opened = time.perf_counter() - started
    batch = data.batch("train", 64, 1024, seed=0, step=10**6)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 1
    assert memory < 8e6
    assert batch.inputs.shape == (64, 1024)

    tokens = data.tokens("train")
    assert isinstance(tokens, Shards)
    windows = tokens.windows(8)
    assert (len(tokens), windows) == (count * size, count * ((size - 1) // 8))
    starts = tokens.starts(np.array([0, windows - 1]), 8)
    assert tokens[starts[1] + np.arange(9)].tolist() == marked.tolist()
    assert not tokens[starts[0] + np.arange(9)].any()
    (last,) = data.windows("validation", 1, 8, most=1)
    assert last.inputs.shape == (1, 8)
    assert re.match("TokenData.100,000,000,000 tokens to train on, 1,000,000,000 to", repr(data))
