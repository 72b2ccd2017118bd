"""Who may import whom, and how long a file may be, read from the sources."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import kernels
from kernels.registry import SPECS

ROOT = Path(__file__).parent.parent
FAMILIES = tuple(dict.fromkeys(spec.family for spec in SPECS.values()))
LEAVES = {"checks", "dispatch", "files", "philox", "linear", "plain", "tolerance", "tuning", "version"}
GPT_LAYERS = (  # top first: a file imports from its own layer and from those below it
    {""},  # gpt/__init__.py
    {"train", "sample", "eval", "info", "__main__"},
    {"training", "generate", "decoding", "sampler", "weights"},
    {"model"},
    {"block", "head", "kv_cache", "kept", "inputs", "packing", "preflight", "step_time", "cluster", "data"},
    {"config", "names", "device", "cuda_graph", "files", "cli"},
    {"memory"},
    {"errors", "interrupts"},
)
IMPORTING_METHODS = {"GPT.fit", "GPT.generate", "GPT.save_pretrained", "GPT.from_pretrained"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path, *, deep: bool = True) -> set[str]:
    """Absolute names of all modules that a file imports; without `deep`, only those at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imported_names(path, ast.walk(tree) if deep else tree.body)


def imported_names(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """Absolute names in the import statements among `nodes`; `from a import b` counts as `a` and as `a.b`."""
    package = path.relative_to(ROOT).with_suffix("").parts
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            modules |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return modules


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of every outermost function and method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        else:
            yield from functions(node, f"{node.name}." if isinstance(node, ast.ClassDef) else prefix)


def gpt_imports(path: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Modules of gpt that a file imports outside functions (for type checking too), and by function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    local, inside = {}, set()
    for name, function in functions(tree):
        nodes = list(ast.walk(function))
        inside |= set(nodes)
        if modules := imported_names(path, nodes) & GPT_MODULES.keys():
            local[name] = modules
    outside = imported_names(path, (node for node in ast.walk(tree) if node not in inside))
    return outside & GPT_MODULES.keys(), local


def layer(module: str) -> int:
    part = module.removeprefix("gpt").removeprefix(".").partition(".")[0]
    return next(number for number, parts in enumerate(GPT_LAYERS) if part in parts)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


GPT_MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sources("gpt")
}


@pytest.mark.parametrize("path", sources("kernels", "gpt", "bench"), ids=names)
def test_nothing_imports_tests(path: Path) -> None:
    """A package that needs its tests to run."""
    assert not any(name.split(".")[0] == "tests" for name in imports(path))


@pytest.mark.parametrize("path", sources("kernels"), ids=names)
def test_kernels_know_nothing_of_gpt_and_bench(path: Path) -> None:
    """kernels that cannot be used without the model."""
    assert not {name.split(".")[0] for name in imports(path)} & {"gpt", "bench"}


@pytest.mark.parametrize("path", sources("gpt"), ids=names)
def test_gpt_uses_public_kernels_only(path: Path) -> None:
    """A model that depends on the inside of `kernels`; only the project's file helpers are shared."""
    public = {"kernels"} | {f"kernels.{name}" for name in kernels.__all__}
    for name in imports(path):
        assert name.split(".")[0] != "kernels" or name in public or name.startswith("kernels.files"), name


def test_files_imports_the_standard_library_only() -> None:
    """A file helper that loads torch."""
    for name in imports(ROOT / "kernels" / "files.py"):
        assert name.split(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", sources("gpt"), ids=names)
def test_nothing_imports_a_command(path: Path) -> None:
    """`python -m gpt.…` that warns because importing the package has loaded the command."""
    commands = {
        f"gpt.{other.stem}" for other in sources("gpt") if "__main__" in other.read_text(encoding="utf-8")
    }
    assert commands == {"gpt.train", "gpt.sample", "gpt.info", "gpt.eval", "gpt.__main__"}
    assert not commands & imports(path)


@pytest.mark.parametrize("module", GPT_MODULES)
def test_gpt_imports_run_downwards(module: str) -> None:
    """A model that needs its trainer, or a config that needs the model, in order to be imported."""
    outside, _ = gpt_imports(GPT_MODULES[module])
    assert [name for name in sorted(outside) if layer(name) < layer(module)] == []


@pytest.mark.parametrize("module", GPT_MODULES)
def test_only_convenience_methods_import_gpt_locally(module: str) -> None:
    """An import that runs upwards, or in a circle, and hides inside a function."""
    _, local = gpt_imports(GPT_MODULES[module])
    assert local.keys() == (IMPORTING_METHODS if module == "gpt.model" else set())


def test_gpt_has_no_import_cycle() -> None:
    """Files of one layer that import each other."""
    graph = {module: gpt_imports(path)[0] for module, path in GPT_MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which lists the cycle


def reaches_triton(path: Path) -> bool:
    return any(name.split(".")[0] == "triton" for name in imports(path))


@pytest.mark.parametrize("path", sources("kernels"), ids=names)
def test_only_kernel_files_import_triton(path: Path) -> None:
    """A reference, a check or a public function that needs triton to be installed."""
    relative = path.relative_to(ROOT / "kernels").parts
    plain = len(relative) == 1 and relative[0] != "device_functions.py"
    plain = plain or relative[-1] in ("__init__.py", "reference.py", "spec.py")
    assert not (plain and reaches_triton(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_is_plain_torch(family: str) -> None:
    """A reference that shares code with the kernel that it must judge."""
    allowed = {"torch", "__future__", "typing", "math", "collections"}
    shared = ("kernels.philox", "kernels.linear", *(f"kernels.{other}.reference" for other in FAMILIES))
    for name in imports(ROOT / "kernels" / family / "reference.py"):
        assert name.split(".")[0] in allowed or name.startswith(shared), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_no_kernel_and_no_neighbour(family: str) -> None:
    """A family that imports triton at once, or that depends on another family."""
    path = ROOT / "kernels" / family / "__init__.py"
    shared = ("kernels.checks", "kernels.dispatch", "kernels.tuning", f"kernels.{family}")
    for name in imports(path):
        if name.startswith("kernels."):
            assert name.startswith(shared), name
    for name in imports(path, deep=False):
        assert not name.startswith(f"kernels.{family}.") or name.split(".")[2] == "reference", name


def test_dispatch_imports_no_family() -> None:
    """A choice that depends on the ops it chooses for."""
    for leaf in LEAVES:
        for name in imports(ROOT / "kernels" / f"{leaf}.py"):
            assert not name.startswith(tuple(f"kernels.{family}" for family in FAMILIES)), (leaf, name)


def test_verify_depends_on_no_op() -> None:
    """An oracle that can judge only the ops of the registry."""
    allowed = ("kernels.dispatch", "kernels.spec", "kernels.tolerance")
    for name in imports(ROOT / "kernels" / "verify.py"):
        assert not name.startswith("kernels.") or name.startswith(allowed), name


@pytest.mark.parametrize("path", sources("kernels", "gpt", "bench", "tests"), ids=names)
def test_files_stay_short(path: Path) -> None:
    """A file that is too long to read in one sitting."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_model_stays_short() -> None:
    """A model that cannot be read from top to bottom in one sitting."""
    assert len((ROOT / "gpt" / "model.py").read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", ["kernels", "gpt"])
def test_everything_exported_exists(module: str) -> None:
    """A name in __all__ that does not exist."""
    imported = __import__(module)
    assert sorted(imported.__all__) == sorted(set(imported.__all__))
    for name in imported.__all__:
        assert hasattr(imported, name), name


def test_imports_stay_light() -> None:
    """`import gpt` that loads triton, a tokenizer, a plotting library or torch's compiler."""
    heavy = ["triton", "tiktoken", "tokenizers", "matplotlib"]
    heavy += ["tqdm", "safetensors", "transformers", "torch._dynamo"]
    loaded = f"[m for m in {heavy} if m in sys.modules and m not in before]"
    program = f"import torch, sys; before = set(sys.modules); import gpt; print({loaded})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_package_ships() -> None:
    """A folder without `__init__.py`: it is not a package, and is missing from the wheel."""
    folders = {path.parent for path in sources("kernels", "gpt", "bench")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
