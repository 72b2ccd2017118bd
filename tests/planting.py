"""Bugs planted in copies of the kernels: an op family's files, copied with replacements in their text."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import kernels

Mutation = tuple[str, str, str]  # file, text, replacement

# The files with kernels. A mutation may also name device_functions, which all families share.
FILES = {
    "attention": ("forward", "backward", "decode"),
    "decode": ("embedding", "linear", "block", "argmax"),
    "norm": ("forward", "backward", "dropout_kernel"),
    "ffn": ("gelu", "gemm"),
    "loss": ("softmax",),
}
SHARED = "device_functions"


@contextmanager
def planted(family: str, *mutations: Mutation) -> Iterator[SimpleNamespace]:
    """While open, the ops of `family` launch copies of the kernels with every text replaced.

    Gives the copies' launchers, by name.
    """
    names = (*FILES[family], SHARED)
    folder = Path(kernels.__file__).parent
    sources = {
        name: (folder / ("" if name == SHARED else family) / f"{name}.py").read_text(encoding="utf-8")
        for name in names
    }
    for name, text, replacement in mutations:
        if text not in sources[name]:
            raise ValueError(f"planted: {family}/{name}.py has no {text!r}")
        sources[name] = sources[name].replace(text, replacement)

    with tempfile.TemporaryDirectory(prefix="mutant_") as root, pytest.MonkeyPatch.context() as patch:
        package = Path(root).name
        folder = Path(root, package)
        folder.mkdir()
        for name, source in sources.items():
            source = re.sub(
                rf"from kernels\.({family}\.)?({'|'.join(names)}) ", rf"from {package}.\2 ", source
            )
            (folder / f"{name}.py").write_text(source, encoding="utf-8")
        patch.syspath_prepend(root)
        try:
            yield _launchers(family, package, patch)
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]


def _launchers(family: str, package: str, patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Imports the copies and makes the family's ops use what they define."""
    torch_op = importlib.import_module(f"kernels.{family}.torch_op")
    launchers = SimpleNamespace()
    for file in FILES[family]:
        copy = importlib.import_module(f"{package}.{file}")
        for name, value in list(vars(torch_op).items()):
            if getattr(value, "__module__", "") == f"kernels.{family}.{file}":
                setattr(launchers, name, getattr(copy, name))
                patch.setattr(torch_op, name, getattr(copy, name))
    return launchers
