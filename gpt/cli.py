"""Command lines from dataclasses: each field is a flag, and a key in a table of a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import math
import os
import re
import signal
import sys
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from gpt.errors import InputError, MachineError, ReportedError, shown, system_error, unknown
from gpt.files import read_regular, user_path
from gpt.interrupts import INTERRUPTED, keyboard_interrupts
from gpt.memory import exhausted
from gpt.names import habitual

Values = dict[str, dict[str, Any]]
CONFIG_LIMIT = 1 << 16  # bytes of a --config file
MOST_DOTS = 200  # in one of its lines
LARGEST_INTEGER = 2**63
LONGEST_LINE = 2000  # characters of a message
USE_TRITON: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is a flag of a command line.

    Args:
        default: The value without the flag.
        help: The text in --help. "(default: …)" is added, unless the text has one and `default` is None.
        choices: The only accepted values.
        low, high: Inclusive bounds, for the check of the dataclass.
        above, below: Exclusive bounds.
    """
    limits = {"choices": choices, "low": low, "high": high, "above": above, "below": below}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata={"help": help, **given})


def use_triton_option() -> Any:
    """The flag --use_triton, whose values are the keys of USE_TRITON."""
    return option(
        "auto", "fused kernels: where faster, wherever they apply, or never", choices=tuple(USE_TRITON)
    )


def device_option() -> Any:
    """The flag --device."""
    return option(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def dtype_option() -> Any:
    """The flag --dtype of commands that load a model to read it."""
    return option(
        "auto",
        "of the weights; auto is the file's. On a CPU, large models generate faster in bfloat16 and int8",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )


def which_option() -> Any:
    """The flag --which."""
    return option(
        "newest",
        "the checkpoint of a run: its newest valid one, or the one with the lowest validation loss",
        choices=("newest", "best"),
    )


class OptionParser(argparse.ArgumentParser):
    """A parser whose flags are the fields of dataclasses, spelt with hyphens or underscores.

    Args:
        prog: The command, for example "python -m gpt.train".
        description: The first paragraph of the help.
        arguments: What comes before the flags, as the usage shows it.
        skip: Fields that are not flags.
        **tables: A dataclass instance for each table. The help shows its values as defaults.
    """

    def __init__(
        self, prog: str, description: str, *, arguments: str = "", skip: Collection[str] = (), **tables: Any
    ) -> None:
        super().__init__(
            usage=" ".join([prog, *arguments.split(), "[flags]"]),
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        )
        self._types: dict[str, dict[str, Any]] = {}
        for table, instance in tables.items():
            self._types[table] = {n: t for n, t in field_types(type(instance)).items() if n not in skip}
            group = self.add_argument_group(table)
            if len(self._types) == 1:
                group.add_argument("-h", "--help", action="help", help="print this text")
            for field in dataclasses.fields(instance):
                if field.name in self._types[table]:
                    _add_flag(group, field, self._types[table][field.name], getattr(instance, field.name))

    def parse_tables(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Values]:
        """Parses a command line.

        Returns:
            The arguments outside the tables, and for each table the values of the given flags.

        Raises:
            InputError: An unknown flag (the message suggests a valid one), or a value of the wrong type.
        """
        namespace, rest = self.parse_known_args([_with_underscores(argument) for argument in argv])
        for argument in rest:
            if not argument.startswith("-"):
                raise InputError(f"unexpected argument {argument!r}, expected flags (--help lists them)")
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            raise self._unknown("flag", argument.partition("=")[0], flags)
        given = vars(namespace)
        values = {
            table: {
                name: convert(f"--{name}", t, given.pop(name)) for name, t in fields.items() if name in given
            }
            for table, fields in self._types.items()
        }
        return namespace, values

    def read_file(self, path: str, tables: Collection[str]) -> Values:
        """The values in a TOML file's `tables`, by table.

        Raises:
            InputError: The file cannot be read, is not a TOML file, or has an unknown table or key or a value
                of the wrong type.
        """
        where = f"--config: {path}"
        raw = read_regular(user_path(path, "--config"), "--config", CONFIG_LIMIT)
        try:
            text = raw.decode("utf-8")
            most_dots = max((line.count(".") for line in text.splitlines()), default=0)
            if most_dots > MOST_DOTS:  # the time of tomllib is the square of the parts of a key
                raise InputError(f"{where}: a line has {most_dots} dots, expected at most {MOST_DOTS}")
            content = tomllib.loads(text)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not a TOML file: {error}") from error
        values: Values = {table: {} for table in tables}
        for table, entries in content.items():
            if table not in values:
                raise unknown(f"{where}: table", table, tables)
            if not isinstance(entries, dict):
                raise InputError(f"{where}: {table} is {shown(entries)}, expected a table [{table}]")
            for name, value in entries.items():
                if name not in self._types[table]:
                    raise self._unknown(f"{where}: [{table}] key", name, self._types[table])
                values[table][name] = convert(f"{where}: [{table}] {name}", self._types[table][name], value)
        return values

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def _unknown(self, where: str, name: str, valid: Collection[str]) -> InputError:
        """The error for a flag or key that is not in `valid`: ours, if it is another package's name."""
        ours = habitual(name.lstrip("-"), [flag.lstrip("-") for flag in valid])
        if ours is None:
            return unknown(where, name, valid, "that --help lists")
        meaning = str(self._option_string_actions[f"--{ours}"].help).partition(" (default: ")[0]
        prefix = "--" if name.startswith("-") else ""
        return InputError(
            f"{where}: {name!r} is unknown, expected {prefix}{ours}: {meaning.replace('%%', '%')}"
        )


def run_command(
    name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None, *, lower: str = ""
) -> int:
    """Runs a command and returns its exit code; see "Exit codes" in gpt/README.md.

    Errors and warnings are printed on stderr, one line each.

    Args:
        name: Begins each line.
        command: Takes the arguments and returns an exit code.
        argv: The arguments; None takes the process's.
        lower: The flags that lower the memory that the command takes, as in "--batch_size".
    """

    def report(message: object) -> None:
        with suppress(OSError):  # stderr is closed or full
            print(f"{name}: {one_line(str(message))}", file=sys.stderr)

    def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        report(f"warning: {message}")

    if sys.stderr is None:  # closed; print(file=None) would write to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        report("stdout is closed, expected a terminal, a file or a pipe")
        return MachineError.exit_code
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are not text

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = print_warning
        try:
            with keyboard_interrupts():
                code = _call(command, sys.argv[1:] if argv is None else argv)
                sys.stdout.flush()
                return code
        except KeyboardInterrupt:
            report(INTERRUPTED)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # the reader of our output has exited, as in `| head`
            return 141
        except ReportedError as error:
            report(error)
            return error.exit_code
        except (MemoryError, OSError, RuntimeError) as error:
            reported = exhausted(error, lower) or (
                system_error(error) if isinstance(error, OSError) else None
            )
            if reported is None:
                raise
            report(reported)
            return reported.exit_code
        finally:
            _empty_output()


def one_line(text: str) -> str:
    """`text` as one line of at most LONGEST_LINE characters, with what cannot be printed escaped."""
    words = " ".join(text.split())
    words = words if len(words) <= LONGEST_LINE else f"{words[:LONGEST_LINE]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def _call(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `command`. --help of argparse, and a second SIGTERM, raise it as SystemExit."""
    try:
        return command(argv)
    except SystemExit as end:
        return int(end.code or 0)


def _empty_output() -> None:
    """Flushes stdout; if that fails, drops what it holds, so that the interpreter does not try again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass: its annotation, or a Literal of the option's choices."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Literal[tuple(field.metadata["choices"])]
        if "choices" in field.metadata
        else hints[field.name]
        for field in dataclasses.fields(cls)
    }


def convert(where: str, expected: Any, value: Any) -> Any:
    """`value`, a flag's text or a TOML value, as the type `expected`.

    Args:
        where: The beginning of the error message.
        expected: bool, int, float, str, a Literal of strings, tuple[str, ...], or a union of these and None,
            which is spelt "none".

    Raises:
        InputError: The value is not of that type.
    """
    options = get_args(expected) if _is_union(expected) else (expected,)
    for option in sorted(options, key=lambda option: option is not types.NoneType):  # "none" is a text too
        try:
            return _parse(option, value)
        except ValueError:
            continue
    raise InputError(f"{where} is {shown(value)}, expected {describe(expected)}")


def describe(expected: Any) -> str:
    """A type as the help and errors show it: "int|none", "true|false", "auto|float32"."""
    if _is_union(expected):
        return "|".join(describe(option) for option in get_args(expected))
    if get_origin(expected) is Literal:
        return "|".join(get_args(expected))
    if get_origin(expected) is tuple:
        return "text ..."
    return {bool: "true|false", str: "text", types.NoneType: "none"}.get(
        expected, getattr(expected, "__name__", str(expected))
    )


def show(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _is_union(expected: Any) -> bool:
    return get_origin(expected) in (Union, types.UnionType)


def _parse(expected: Any, value: Any) -> Any:
    """`value` as the type `expected`, which is not a union; ValueError if it is not of that type."""
    text = isinstance(value, str)
    if get_origin(expected) is tuple and (text or isinstance(value, list)):
        return tuple(_parse(get_args(expected)[0], item) for item in ([value] if text else value))
    if (get_origin(expected) is Literal and value in get_args(expected)) or (expected is str and text):
        return value
    if expected is types.NoneType and text and value.lower() == "none":
        return None
    if expected is bool and isinstance(value, (bool, str)) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if expected in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, expected)):
        try:
            number = expected(value)
        except OverflowError as error:  # float(10**400)
            raise ValueError from error
        if math.isfinite(number) if expected is float else abs(number) < LARGEST_INTEGER:
            return number
    raise ValueError


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], expected: Any, default: Any
) -> None:
    kind: dict[str, Any] = {}
    if expected is bool or "true" in get_args(expected):
        kind = {"nargs": "?", "const": "true"}
    elif get_origin(expected) is tuple:
        kind, expected = {"nargs": "+"}, get_args(expected)[0]
    text = field.metadata["help"]
    if show(default) and (default is not None or "(default: " not in text):
        text += f" (default: {show(default)})"
    group.add_argument(f"--{field.name}", metavar=describe(expected), help=text.replace("%", "%%"), **kind)


def _with_underscores(argument: str) -> str:
    flag = re.match(r"--[A-Za-z][\w-]*(?==|$)", argument)
    return "--" + flag[0][2:].replace("-", "_") + argument[flag.end() :] if flag else argument
