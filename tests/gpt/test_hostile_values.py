"""Values that nobody means, in every field, flag and key: refused in one line, or taken for a number."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from gpt import DataConfig, GPTConfig, InputError, TrainConfig
from gpt.cli import CONFIG_LIMIT, OptionParser
from gpt.eval import EvalConfig
from gpt.info import StepOptions
from gpt.sample import SampleConfig
from gpt.sampler import LARGEST, SMALLEST
from gpt.train import RunConfig

CONFIGS = (GPTConfig, TrainConfig, DataConfig, RunConfig, SampleConfig, EvalConfig, StepOptions)
TEXTS = (
    *("0", "-1", "-0", "nan", "inf", "-inf", "1e39", "1e400", "1e-320", str(2**63), str(10**30), "9" * 5000),
    *("", " ", "１２", "1_000", "0x10", "1e3", "+5", "٣", "1,5", "None", "true", "\udcff", "1\0", "½"),
)
TOML = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e39",
        "1e400",
        "1e-320",
        "9223372036854775808",
        f"1{'0' * 400}",
        f"0x{'f' * 5000}",
    ),
    *("2026-11-26", "10:00:00", "2026-11-26T10:00:00Z", "true", '""', '"1"', "[]", "[[1]]", "{}", "{a = 1}"),
    *('"\\u0000"', f"{'[' * 99}{']' * 99}"),
)
NUMERIC = [
    (config, field.name)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if {int, float} & {get_type_hints(config)[field.name], *get_args(get_type_hints(config)[field.name])}
]


@functools.cache
def parser(config: Any) -> OptionParser:
    return OptionParser("x", "", table=config())


def one_line(error: InputError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 20_000


def check(config: Any, name: str, value: Any) -> None:
    """Asserts that `value` is finite and, as an integer, fits 64 bits, where the field `name` accepts it."""
    given = getattr(config(**{name: value}), name)
    assert given is None or (-math.inf < given < math.inf), (config, name)
    assert not isinstance(given, int) or abs(given) < 2**63, (config, name)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_every_numeric_flag(text: str) -> None:
    """A traceback, or NaN that passes a check of bounds because every comparison with it is false."""
    for config, name in NUMERIC:
        try:
            given = parser(config).parse_tables([f"--{name}={text}"])[1]["table"][name]
            check(config, name, given)
        except InputError as error:
            one_line(error)


@pytest.mark.parametrize("text", TOML, ids=lambda text: text[:20])
def test_every_toml_value(text: str, tmp_path: Path) -> None:
    """A value of TOML that Python cannot convert or print, as a traceback."""
    for config in (GPTConfig, TrainConfig, DataConfig):
        for field in dataclasses.fields(config):
            path = tmp_path / f"{field.name}.toml"
            path.write_text(f"[table]\n{field.name} = {text}\n")
            try:
                values = parser(config).read_file(str(path), ["table"])["table"]
                if (config, field.name) in NUMERIC:
                    check(config, field.name, values[field.name])
            except InputError as error:
                one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 20_000,
        "x = " + "{a = " * 5_000,
        "a." * 30_000 + "a = 1",
        "[" + "a." * 30_000 + "a]",
        "[model]\nn_layer." + "a." * 199 + "a = 1",
        "x = 'a" + "x" * CONFIG_LIMIT,
        "\0",
        "x = '\0'",
        "x = 1\r",
        "﻿x = 1",
        "[model]\n[model]\n",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_a_hostile_config_file(text: str, tmp_path: Path) -> None:
    """A RecursionError, or a key of many parts that takes minutes."""
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"^--config: ") as caught:
        OptionParser("x", "", model=GPTConfig()).read_file(str(path), ["model"])
    one_line(caught.value)


def test_a_config_file_that_is_not_text(tmp_path: Path) -> None:
    """A UnicodeDecodeError that does not name the file."""
    path = tmp_path / "x.toml"
    path.write_bytes(b"x = '\xff'")
    with pytest.raises(InputError, match=r"^--config: .*x\.toml is not a TOML file"):
        OptionParser("x", "", model=GPTConfig()).read_file(str(path), ["model"])


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, 1e308, "1", True, None, [1], 1e-320]
)
def test_every_numeric_field_of_a_config(value: Any) -> None:
    """A field that Python code sets, and that no check of the command line protects."""
    for config, name in NUMERIC:
        if config in (GPTConfig, TrainConfig):
            try:
                check(config, name, value)
            except InputError:
                continue
            assert value is None or isinstance(value, (int, float)), (name, value)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "grad_clip"])
def test_a_rate_that_float32_cannot_hold(name: str) -> None:
    """A rate that overflows in the optimizer, in the first step and as an error of torch."""
    with pytest.raises(InputError, match=rf"{name} is 1e\+39, expected a number in "):
        TrainConfig(**{name: 1e39})
    TrainConfig(**{name: 1e9})


def test_an_epsilon_that_float32_cannot_hold() -> None:
    """An epsilon that is zero on the device: a constant row is then divided by zero."""
    with pytest.raises(InputError, match=r"eps is 1e-46, expected a number in \[1e-30, 1\)"):
        GPTConfig(eps=1e-46)


def test_the_scales_of_sampling_are_finite_in_float32() -> None:
    """A temperature that float32 rounds to zero or to infinity."""
    assert 2.0**-126 < SMALLEST < LARGEST < 2.0**127
