"""Flags and TOML tables from dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpt import InputError
from gpt.cli import OptionParser, option
from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import DataConfig
from gpt.names import HABITS
from gpt.sample import SampleConfig
from gpt.train import RunConfig

CONFIGS = OptionParser("x", "", run=RunConfig(), model=GPTConfig(), train=TrainConfig(), data=DataConfig())
SAMPLE = OptionParser("x", "", sample=SampleConfig())


@dataclass(frozen=True)
class Fruit:
    max_count: int = option(3, "how many")
    weight: float = option(1.5, "100% of it")
    ripe: bool = option(False, "")
    peel: bool | None = option(None, "")
    limit: int | None = option(None, "")
    kind: str = option("apple", "", choices=("apple", "pear"))
    names: tuple[str, ...] = option(("a", "b"), "")


def parser() -> OptionParser:
    return OptionParser("fruit", "Counts fruit.", fruit=Fruit())


def parse(*argv: str) -> dict[str, Any]:
    return parser().parse_tables(argv)[1]["fruit"]


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--max_count 4", {"max_count": 4}),
        ("--max-count=4", {"max_count": 4}),
        ("--weight 3", {"weight": 3.0}),
        ("--weight=-2e-3", {"weight": -2e-3}),
        ("--ripe", {"ripe": True}),
        ("--ripe false --peel True", {"ripe": False, "peel": True}),
        ("--peel none --limit None", {"peel": None, "limit": None}),
        ("--limit 7", {"limit": 7}),
        ("--kind pear", {"kind": "pear"}),
        ("--names x-y --max_count 1", {"names": ("x-y",), "max_count": 1}),
        ("--names x y z", {"names": ("x", "y", "z")}),
        ("", {}),
    ],
)
def test_flags_become_values(argv: str, values: dict[str, Any]) -> None:
    """A value of another type, a hyphen replaced inside a value, or a default that counts as given."""
    given = parse(*argv.split())
    assert given == values
    assert {name: type(value) for name, value in given.items()} == {
        name: type(value) for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--max_count 4.5", "--max_count '4.5' int"),
        ("--max_count none", "--max_count 'none' int"),
        ("--weight heavy", "--weight 'heavy' float"),
        ("--ripe maybe", "--ripe 'maybe' true|false"),
        ("--limit x", "--limit 'x' int|none"),
        ("--kind plum", "--kind 'plum' apple|pear"),
        ("--max_cuont 4", "'--max_cuont' '--max_count'"),
        ("--max-cuont=4", "'--max_cuont' '--max_count'"),
        ("--max_count", "--max_count argument"),
        ("stray", "'stray' --help"),
        ("--zzzz 4", "'--zzzz' --help"),
    ],
)
def test_wrong_flags_are_named(argv: str, words: str) -> None:
    """A message without the flag, the value or what was expected."""
    with pytest.raises(InputError) as caught:
        parse(*argv.split())
    for word in words.split():
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--lr", "--learning_rate: highest learning rate"),
        ("--num-epochs", "--max_steps: optimizer steps"),
        ("--bs", "--batch_size: "),
        ("--context_length", "--block_size: "),
        ("--emb_dim", "--n_embd: "),
        ("--model", "--preset: "),
    ],
)
def test_names_of_other_packages_are_understood(flag: str, ours: str) -> None:
    """`--lr` taken for --min_lr because the letters are similar."""
    with pytest.raises(InputError, match=f"is unknown, expected {ours}"):
        CONFIGS.parse_tables([flag, "3"])


def test_names_of_other_packages_in_a_file(tmp_path: Path) -> None:
    """The same in a TOML file, with a flag's dashes."""
    with pytest.raises(InputError, match=r"\[train\] key: 'lr' is unknown, expected learning_rate: highest"):
        CONFIGS.read_file(write(tmp_path / "f.toml", "[train]\nlr = 1e-3\n"), ["train"])


def test_habits_are_names_of_flags() -> None:
    """A flag that was renamed, which no name of another package leads to any more."""
    known = {action.dest for action in [*CONFIGS._actions, *SAMPLE._actions]}
    assert HABITS.keys() <= known
    words = " ".join(HABITS.values()).split()
    assert not known & set(words) - {"checkpoint"}  # gpt.train calls it --init


def test_help_shows_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """A help text that leaves something out, or that a percent sign breaks."""
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in (
        "--max_count int",
        "how many (default: 3)",
        "100% of it (default: 1.5)",
        "apple|pear",
        "(default: a b)",
        "int|none",
    ):
        assert part in text


@pytest.mark.parametrize("columns", [80, 160])
def test_help_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that a terminal breaks within a word, or a narrow column on a wide one."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        CONFIGS.parse_tables(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert columns - 10 < max(map(len, lines)) < columns
    assert lines[0] == "usage: x [flags]"


def test_every_field_of_the_configs_is_a_flag() -> None:
    """A field whose annotation the parser does not understand."""
    flags = {
        "n_layer": "3",
        "tie_weights": "false",
        "head_dim": "none",
        "learning_rate": "1",
        "patience": "2",
        "data": "a",
    }
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    _, values = CONFIGS.parse_tables(argv)
    assert values["model"] == {"n_layer": 3, "tie_weights": False, "head_dim": None}
    assert values["train"] == {"learning_rate": 1.0, "patience": 2}
    assert values["data"] == {"data": ("a",)}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_toml_values(tmp_path: Path) -> None:
    """A TOML value that is read differently from the same value of a flag."""
    text = (
        '[fruit]\nmax_count = 4\nweight = 2\nripe = true\nlimit = "none"\nnames = ["x", "y"]\nkind = "pear"\n'
    )
    values = parser().read_file(write(tmp_path / "f.toml", text), ["fruit"])
    assert values == {
        "fruit": {
            "max_count": 4,
            "weight": 2.0,
            "ripe": True,
            "limit": None,
            "names": ("x", "y"),
            "kind": "pear",
        }
    }
    assert type(values["fruit"]["weight"]) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[friut]\n", "'friut' 'fruit'"),
        ("max_count = 3\n", "'max_count' fruit"),
        ("fruit = 3\n", "fruit 3 [fruit]"),
        ("[fruit]\nmax_cuont = 3\n", "[fruit] 'max_cuont' 'max_count'"),
        ("[fruit]\nmax_count = true\n", "max_count True int"),
        ("[fruit]\nmax_count = 1.5\n", "max_count 1.5 int"),
        ("[fruit]\nripe = 1\n", "ripe 1 true|false"),
        ("[fruit]\nkind = 1\n", "kind 1 apple|pear"),
        ("[fruit]\nnames = [1]\n", "names [1] text"),
        ("[fruit\n", "TOML f.toml"),
    ],
)
def test_wrong_toml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """A mistake in a file that passes, or an error that does not name its place."""
    with pytest.raises(InputError) as caught:
        parser().read_file(write(tmp_path / "f.toml", text), ["fruit"])
    for word in words.split():
        assert word in str(caught.value)


def test_a_missing_toml_file_is_named(tmp_path: Path) -> None:
    """A traceback for a mistyped path."""
    with pytest.raises(InputError, match=r"nowhere\.toml.*No such file"):
        parser().read_file(str(tmp_path / "nowhere.toml"), ["fruit"])
