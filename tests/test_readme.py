"""The documents: their code runs as stated, and the flags, names, files and links in them exist."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt
import gpt.config
from kernels import dispatch
from tests.gpt.text import TEXT

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "kernels/README.md", "gpt/README.md", "bench/README.md", "CONTRIBUTING.md")
STATED = {
    "README.md": 0,
    "kernels/README.md": 6,
    "gpt/README.md": 10,
}  # results that a document states, at least
SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # its 65 characters
FOREIGN_FLAGS = {"--benchmark-compare", "--benchmark-only", "--benchmark-save", "--dist", "--nproc_per_node"}
EXAMPLE = re.compile(r"activation|relu_squared")  # names of the op that CONTRIBUTING.md adds as an example
EXAMPLE_FILE = re.compile(
    r"^\*\*`(kernels/[\w/]+\.py)`\*\*(?:(?!^```).)*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@functools.cache
def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)


def prose(document: str) -> str:
    """The document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text(document), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets at a size that takes no time, on a CPU, in a folder with the text that the documents read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSED_GPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "input.txt").write_text(
        SHAKESPEARE + "".join(c for c in TEXT[:2000] if c in SHAKESPEARE), encoding="utf-8"
    )

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    steps = {"max_steps": 2, "batch_size": 2, "eval_batches": 1}
    monkeypatch.setitem(gpt.config._MODEL_PRESETS, "char-cpu", shape)
    monkeypatch.setitem(gpt.config._TRAIN_PRESETS, "char-cpu", steps)
    monkeypatch.setattr("gpt.training.trainer.SAMPLE_TOKENS", 5)
    monkeypatch.setattr(dispatch, "interpreting", False)  # the references run, as on any CPU


class Checks(ast.NodeTransformer):
    """Turns `expression  # literal` into `check(expression, literal)`."""

    def __init__(self, code: str) -> None:
        self.lines = code.splitlines()
        self.count = 0

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        assert node.end_lineno is not None
        after = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        comment = after.strip().removeprefix("# ")
        with contextlib.suppress(SyntaxError, ValueError):
            ast.literal_eval(comment)
            self.count += 1
            source = ast.unparse(node)
            return ast.parse(f"check({source}, {comment}, {source!r})").body[0]  # type: ignore[return-value]
        return node


def check(actual: Any, stated: Any, source: str) -> None:
    assert actual == stated, f"{source} is {actual!r}, the document says {stated!r}"


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::kernels.FallbackWarning")
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CONTRIBUTING.md"])
def test_code_runs(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that fails when typed, or a result that is not the one in the comment after it."""
    installed = importlib.util.find_spec("peft") is not None  # it is not in every set of versions
    code = "".join(block for block in blocks(document, "python") if installed or "import peft" not in block)
    code = code.replace('"cuda"', '"cpu"')
    if document == "README.md":
        monkeypatch.setitem(gpt.config._MODEL_PRESETS, "gpt2", gpt.config._MODEL_PRESETS["char-cpu"])
    ids, heads = torch.randint(65, (2, 16)), torch.randn(1, 2, 8, 16)
    names: dict[str, Any] = {"tokens": ids, "targets": ids, "prompt": ids, "q": heads, "k": heads, "v": heads}

    checks = Checks(code)
    tree = ast.fix_missing_locations(checks.visit(ast.parse(code)))
    exec(compile(tree, document, "exec"), names | {"check": check})
    assert checks.count >= STATED.get(document, 0)


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """The flags in a command's help."""
    output = io.StringIO()
    module = f"{command}.__main__" if command in ("bench", "tests.scorecard") else command
    loaded = sys.modules.pop(module, None)  # otherwise runpy warns that the module is loaded already
    argv, sys.argv = sys.argv, [command, "--help"]
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            runpy.run_module(command, run_name="__main__")
    finally:
        sys.argv = argv
        if loaded is not None:
            sys.modules[module] = loaded
    return frozenset(re.findall(r"--\w+", output.getvalue()))


def commands(document: str) -> list[tuple[str, str]]:
    """(module, arguments) of each command of gpt, bench and tests.scorecard in a document."""
    return re.findall(r"-m ((?:gpt\.|bench\b|tests\.scorecard\b)[.\w]*)([^`#\n]*)", text(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_of_commands_exist(document: str) -> None:
    """A flag that was renamed and is still recommended."""
    for command, arguments in commands(document):
        unknown = set(re.findall(r"--\w+", arguments)) - flags_of(command)
        assert not unknown, (command, unknown)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_prose_exist(document: str) -> None:
    """The same in prose and tables: the flag of no command."""
    mentioned = set(re.findall(r"(?<=`)--[\w-]+", prose(document))) - FOREIGN_FLAGS
    if mentioned:
        modules = {command for name in DOCUMENTS for command, _ in commands(name)}
        known = frozenset().union(*(flags_of(module) for module in modules))
        assert mentioned <= known, mentioned - known


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    place, *parts = name.split(".")
    value: Any = importlib.import_module(place)
    for part in parts:
        place += f".{part}"
        with contextlib.suppress(ImportError):
            importlib.import_module(place)
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_exist(document: str) -> None:
    """A function, class or module that was renamed and is still recommended."""
    names = set(re.findall(r"(?<![\w/.-])(?:gpt|kernels|bench|tests)(?:\.[A-Za-z_]\w*)+", text(document)))
    for name in names:
        assert EXAMPLE.search(name) or exists(name), name


def test_names_in_the_changelog_exist() -> None:
    """A module that moved once more, so that the table of the changelog leads nowhere."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text("CHANGELOG.md"), re.MULTILINE)
    moved = [(before, name) for before, now in rows for name in re.findall(r"`([\w.]+)`", now)]
    assert len(moved) >= 20
    for before, name in moved:
        assert exists(name), (before, name)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    """A link to a file or a heading that has moved."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(document)):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document: str) -> None:
    """A file of this project that was renamed and is still mentioned."""
    for name in re.findall(r"`((?:kernels|gpt|bench|tests|\.ci|\.github)/[\w./-]*)`", prose(document)):
        assert EXAMPLE.search(name) or (ROOT / name).exists(), name


def test_the_example_op_is_right(tmp_path: Path) -> None:
    """The op that CONTRIBUTING.md adds as an example no longer works when copied from there."""
    pytest.importorskip("triton", reason="triton is not installed")
    files = dict(EXAMPLE_FILE.findall(text("CONTRIBUTING.md")))
    names = ("__init__", "reference", "forward", "backward", "torch_op", "spec", "builds")
    assert {f"kernels/activation/{name}.py" for name in names} <= set(files)

    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "activation").mkdir()
    for name, code in files.items():
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write("\n\n" + code if (ROOT / name).exists() else code)

    compare = """
import torch
from kernels.activation.spec import RELU_SQUARED as spec
from kernels.verify import check

for case in spec.tagged("small", "edge"):
    for dtype in (torch.float32, torch.float16):
        for backend in ("triton", "reference"):
            for verdict in check(spec, case, dtype, torch.device("cpu"), backend=backend):
                assert verdict.ok, (case.id, dtype, backend, str(verdict))
"""
    build = "from kernels.activation.spec import RELU_SQUARED as spec; assert len(list(spec.builds(90))) == 6"
    for program, interpret in ((compare, "1"), (build, "0")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"TRITON_INTERPRET": interpret},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_readme_stays_short() -> None:
    """A README that nobody reads to its end."""
    assert len(text("README.md").splitlines()) <= 130
