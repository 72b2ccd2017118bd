"""Damaged tokenizer files, and the merges that are written into them."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt import BPETokenizer, CharTokenizer, InputError, load_tokenizer
from gpt.data import tokenizers
from gpt.data.tokenizers import END_OF_TEXT, fingerprint
from tests.gpt.text import TEXT

SAMPLE = 'the cat "sat" \U0001f642\n  on <|endoftext|> it'
VALUES: list[Any] = [None, True, 0, -1, 3, 256, 2**70, 0.5, 1e400, "", "a", "Ġ", "\ud800", "東", "a b c"]
VALUES += [[], {}, [1], [["a", "b"]], {"a": 1}, [None], ["a", "b", "c"], "x" * 5000]
BYTES = {bytes([b]): b for b in range(256)}


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 290)


def containers(node: Any) -> Iterator[Any]:
    """Every object and list of a JSON value."""
    if isinstance(node, (dict, list)):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from containers(child)


def mutated(state: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one entry deleted, replaced, repeated, swapped or renamed."""
    state = copy.deepcopy(state)
    # Few of the entries are in the upper levels: choose among the containers by level.
    target = state if rng.random() < 0.15 else rng.choice([c for c in containers(state) if c])
    if rng.random() < 0.3:
        target = state["model"]
    keys = list(target) if isinstance(target, dict) else list(range(len(target)))
    key, other = rng.choice(keys), rng.choice(keys)
    change = rng.randrange(5)
    if change == 0:
        del target[key]
    elif change == 1:
        target[key], target[other] = target[other], target[key]
    elif change == 2 and isinstance(target, list):
        target.insert(rng.randrange(len(target)), copy.deepcopy(target[key]))
    elif change == 3 and isinstance(target, dict):
        target[str(rng.choice(VALUES))] = target.pop(key)
    else:
        target[key] = copy.deepcopy(rng.choice(VALUES))
    return state


def refusal(path: Path) -> str | None:
    """The error for a tokenizer file. None if it loads; it then keeps a text, and itself when saved."""
    try:
        tokenizer = load_tokenizer(path)
    except InputError as error:
        return str(error)
    if isinstance(tokenizer, BPETokenizer):
        assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
        assert tokenizer.decode(tokenizer.encode(SAMPLE, special=True)) == SAMPLE
    tokenizer.save(path.parent / "saved")
    again = load_tokenizer(path.parent / "saved")
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.decode(range(again.vocab_size)) == tokenizer.decode(range(again.vocab_size))
    return None


def is_one_line(message: str) -> bool:
    return message.startswith("tokenizer: ") and "\n" not in message and len(message) < 1000


def test_mutants_of_a_tokenizer_are_refused_or_round_trip(bpe: BPETokenizer, tmp_path: Path) -> None:
    """A tokenizer.json with a wrong type, id or merge that ends in a traceback, or that encodes wrongly."""
    rng = random.Random(0)
    states = [bpe.to_json(), CharTokenizer.train(TEXT).to_json()]
    errors = []
    for i in range(320):
        state = mutated(states[i % 8 == 7], rng)
        (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        if error := refusal(tmp_path / "tokenizer.json"):
            errors.append(error)
    assert all(map(is_one_line, errors))
    assert 200 < len(errors) < 310  # the others are of fields that do not matter, or of their order


def test_damaged_bytes_of_a_tokenizer_are_refused_or_round_trip(bpe: BPETokenizer, tmp_path: Path) -> None:
    """A traceback for a truncated or changed file."""
    rng = random.Random(0)
    bpe.save(tmp_path)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe.to_json()["model"]["merges"]), ""])
    for content in ((tmp_path / "tokenizer.json").read_bytes(), merges.encode()):
        for i in range(60):
            at = rng.randrange(len(content))
            instead = rng.choice([b"", rng.randbytes(1), content[at : at + 9] * 2])
            damaged = content[:at] + instead + content[at + 1 :] if i % 5 else content[:at]
            (tmp_path / "damaged").write_bytes(damaged)
            assert is_one_line(refusal(tmp_path / "damaged") or "tokenizer: loads")


MUTATIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "bool": (lambda model: model["vocab"].update({"!": False}), "integers"),
    "float": (lambda model: model["vocab"].update({"!": 0.0}), "integers"),
    "string": (lambda model: model["vocab"].update({"!": "0"}), "integers"),
    "huge": (lambda model: model["vocab"].update({"!": 2**70}), "without gaps"),
    "negative": (lambda model: model["vocab"].update({"!": -1}), "without gaps"),
    "duplicate": (lambda model: model["vocab"].update({"!": 1}), "distinct"),
    "empty": (lambda model: model["vocab"].update({"": len(model["vocab"])}), "none empty"),
    "triple": (lambda model: model["merges"].append(["a", "b", "c"]), "not a pair of tokens"),
    "word": (lambda model: model["merges"].append("abc"), "not a pair of tokens"),
    "number": (lambda model: model["merges"].append(3), "not a pair of tokens"),
    "missing": (lambda model: model["merges"].pop(), "the merge of .* is missing"),
    "foreign": (lambda model: model["merges"].append(["a", "東"]), "printable bytes"),
    "unknown": (lambda model: model["merges"].append(["q", "q"]), "'qq', which is not in the vocabulary"),
    "special": (lambda model: model["vocab"].update({END_OF_TEXT: 3}), "several ids"),
    "list": (lambda model: model.update(vocab=[]), "'vocab' is a list, expected a dict"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_field_is_named(name: str, bpe: BPETokenizer, tmp_path: Path) -> None:
    """An error that does not state what is wrong with the file, or a file that loads with a wrong id."""
    mutate, message = MUTATIONS[name]
    state = bpe.to_json()
    mutate(state["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_surrogates_are_refused(bpe: BPETokenizer) -> None:
    """A UnicodeEncodeError, or a text that changes, for what an undecodable command line contains."""
    message = r"lone surrogate U\+DCFF at position 1"
    for special in (False, True):
        with pytest.raises(InputError, match=message):
            bpe.encode("a\udcff", special=special)
    with pytest.raises(InputError, match=message):
        CharTokenizer("a\udcff")
    with pytest.raises(InputError, match=message):
        BPETokenizer(BYTES, {"a\udcff": 256})


@pytest.mark.parametrize("name", ["", "a"])
def test_names_of_special_tokens_are_unique(name: str) -> None:
    """A special token that is lost when the tokenizer is saved, or that matches everywhere."""
    with pytest.raises(InputError, match="is empty or also an ordinary one"):
        BPETokenizer(BYTES, {name: 256})


def test_only_regular_files_of_a_sensible_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that never ends or takes all memory, or a traceback for a path that is none."""
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="zero is a character device, expected a regular file"):
        load_tokenizer(tmp_path / "zero")
    for path in ("x" * 300, "a\0b", "~nosuchuser/x"):
        with pytest.raises(InputError, match=r"^tokenizer: "):
            load_tokenizer(path)
    monkeypatch.setattr(tokenizers, "SIZE_LIMIT", 100)
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(InputError, match="has more than 100 bytes"):
        load_tokenizer(tmp_path / "large")


def test_gpt2_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError for a user without a home folder, or tiktoken's cache that is then not used."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "FUSED_GPT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    content = b"#version: 0.2\nt h\nth e\n"
    monkeypatch.setattr(tokenizers, "GPT2_MERGES_SHA256", hashlib.sha256(content).hexdigest())
    (tmp_path / hashlib.sha1(tokenizers.GPT2_MERGES.encode()).hexdigest()).write_bytes(content)
    assert BPETokenizer.gpt2().encode("the") == [257]


def merge_simply(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The definition: merge the leftmost pair of the lowest rank until no pair has a rank below `below`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc"])
def test_merging_follows_its_definition(alphabet: bytes) -> None:
    """Another order of merging: not leftmost first, or a pair whose part has gone."""
    rng = random.Random(0)
    for _ in range(40):
        ranks, tokens, pairs = dict(BYTES), [bytes([b]) for b in alphabet], {}
        for _ in range(rng.randrange(1, 25)):
            token = rng.choice(tokens) + rng.choice(tokens)
            if token not in ranks and len(token) < 40:
                ranks[token] = len(ranks)
                tokens.append(token)
        for _ in range(20):
            text, below = bytes(rng.choices(alphabet, k=rng.randrange(1, 60))), rng.randrange(256, 290)
            assert tokenizers._encode(text, ranks, pairs, below=below) == merge_simply(text, ranks, below)


def test_long_tokens_take_time_in_proportion() -> None:
    """A run of one letter in the vocabulary whose merges take half a minute at each save."""
    ranks = BYTES | {b"a" * 2**k: 255 + k for k in range(1, 16)}
    start = time.process_time()
    tokenizer = BPETokenizer(ranks)
    assert time.process_time() - start < 10  # 0.3 s; by the definition, minutes
    assert tokenizer.merges == [(b"a" * 2**k,) * 2 for k in range(15)]


def test_merges_are_computed_once(bpe: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges that each checkpoint computes again."""
    monkeypatch.delattr(tokenizers, "_merges")
    for _ in range(2):
        bpe.save(tmp_path)
        fingerprint(bpe)


def test_a_token_that_is_not_a_merge_is_refused() -> None:
    """A tokenizer.json with a merge of three parts, which no other package reads."""
    with pytest.raises(InputError, match="token 'abc' has 3 parts that are earlier tokens"):
        BPETokenizer(BYTES | {b"abc": 256})
