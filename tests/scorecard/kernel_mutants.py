"""The row that mutates kernels and references systematically: the checks must kill nine of ten mutants.

A mutant differs from the source in one operator, constant, argument or mask. Kernels are planted as copies
(`tests.planting`), references are replaced in place; each mutant runs in a forked child.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import math
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import kernels
from kernels.registry import SPECS
from kernels.spec import Case
from kernels.tuning import Tile
from kernels.verify import check
from tests.planting import FILES, SHARED, planted
from tests.scorecard.equivalents import EQUIVALENT
from tests.scorecard.row import Outcome, Row
from tests.scorecard.trials import Say, run_trials

FOLDER = Path(kernels.__file__).parent
CPU = torch.device("cpu")
KILLED = 0.9  # the share of mutants, equivalent ones aside, that must be killed
LIMIT = 60  # seconds of CPU time after which a mutant counts as killed: it does not end
SURVIVES = "survives"
# Which family's checks run on a mutant of a file that several families share.
REFERENCES = {f"{family}/reference.py": family for family in FILES} | {"philox.py": "norm"}
DEVICE_FUNCTIONS = {"gelu": "ffn", "decay": "ffn", "keep": "norm", "columns": "norm"}

OPERATORS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Add: ("-",),
    ast.Sub: ("+",),
    ast.Mult: ("/",),
    ast.Div: ("*",),
    ast.FloorDiv: ("*",),
    ast.Mod: ("//",),
    ast.BitAnd: ("|",),
    ast.BitOr: ("&",),
    ast.RShift: ("<<",),
    ast.Lt: ("<=",),
    ast.LtE: ("<",),
    ast.Gt: (">=",),
    ast.GtE: (">",),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
}
FUNCTIONS = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "sum": "max",
    "exp2": "exp",
    "log2": "log",
    "rsqrt": "sqrt",
    "zeros": "ones",
    "exp": "exp2",
    "sqrt": "exp",
}
SYMMETRIC = {"minimum", "maximum", "min", "max", "promote_types", "transpose"}  # in their first two arguments


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: Below `kernels`.
        family: The op family with the checks.
        line: Its number in the file.
        change: The line before, and what replaces what in it.
        source: The whole file with the change.
    """

    file: str
    family: str
    line: int
    change: str
    source: str

    @property
    def key(self) -> str:
        """A name that stays when lines above it come or go."""
        return f"{self.file}: {self.change}"

    @property
    def equivalent(self) -> bool:
        """Whether EQUIVALENT has this mutant, or every mutant of its line."""
        return any(self.key == key or self.key.startswith(f"{key} | ") for key in EQUIVALENT)


def mutants() -> list[Mutant]:
    """Every mutant, in the order of the files."""
    files = {f"{family}/{name}.py": family for family, names in FILES.items() for name in names}
    files |= {f"{SHARED}.py": "", **REFERENCES}
    return [mutant for file, family in files.items() for mutant in _mutants_of(file, family)]


def _mutants_of(file: str, family: str) -> Iterator[Mutant]:
    source = (FOLDER / file).read_text(encoding="utf-8")
    text = Text(source)
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("__"):
            continue
        checked = family or next((f for part, f in DEVICE_FUNCTIONS.items() if part in function.name), "")
        if not checked:
            continue
        for statement in function.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                continue
            for node in _computing(statement):
                for old, new in _changes(node, text):
                    begin, end = text.span(old)
                    line = old.lineno  # type: ignore[attr-defined]
                    short = " ".join(new.split())
                    change = f"{text.lines[line - 1].strip()} | {' '.join(text(old).split())} -> {short}"
                    changed = text.content[:begin] + new.encode() + text.content[end:]
                    yield Mutant(file, checked, line, change, changed.decode())


def _computing(statement: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement, without what affects the speed alone."""
    yield statement
    for child in ast.iter_child_nodes(statement):
        if not (
            isinstance(child, ast.keyword) and child.arg in ("num_warps", "num_stages", "warp_specialize")
        ):
            yield from _computing(child)


class Text:
    """A source, which gives the text of a node of its tree."""

    def __init__(self, source: str) -> None:
        self.content = source.encode()
        self.lines = source.splitlines()
        self._starts = [0, *itertools.accumulate(len(line) + 1 for line in self.content.split(b"\n"))]

    def span(self, node: Any) -> tuple[int, int]:
        """The first byte of a node, and the one after its last."""
        begin = self._starts[node.lineno - 1] + node.col_offset
        return begin, self._starts[node.end_lineno - 1] + node.end_col_offset

    def __call__(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.content[begin:end].decode()


def _changes(node: ast.AST, text: Text) -> Iterator[tuple[ast.AST, str]]:
    """Each replacement of a node by another text."""
    if isinstance(node, ast.BinOp):
        left, right = text(node.left), text(node.right)
        for operator in OPERATORS.get(type(node.op), ()):
            yield node, f"(({left}) {operator} ({right}))"
        if isinstance(node.op, (ast.BitAnd, ast.Mult, ast.Add)):
            yield node, f"({left})"
        if isinstance(node.op, ast.BitAnd):
            yield node, f"({right})"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in OPERATORS.get(type(node.ops[0]), ()):
            yield node, f"(({text(node.left)}) {operator} ({text(node.comparators[0])}))"
    elif isinstance(node, ast.Call):
        yield from _changed_call(node, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node, f"({text(node.operand)})"
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield node.test, f"(not ({text(node.test)}))"
    elif isinstance(node, ast.AugAssign):
        yield node, f"{text(node.target)} = {text(node.value)}"
    elif isinstance(node, ast.Constant) and not isinstance(node.value, (str, bool, bytes)):
        if isinstance(node.value, int):
            yield node, str(1 if node.value == 0 else node.value - 1)
            yield node, str(node.value + 1 if node.value else -1)
        elif isinstance(node.value, float):
            yield node, repr(node.value * 1.25 if node.value else 1.0)


def _changed_call(node: ast.Call, text: Text) -> Iterator[tuple[ast.AST, str]]:
    """Another function, two arguments swapped, or a mask dropped."""
    function = node.func
    if (
        isinstance(function, ast.Attribute)
        and function.attr in FUNCTIONS
        and isinstance(function.value, ast.Name)
    ):
        whole = text(node)
        yield node, f"{function.value.id}.{FUNCTIONS[function.attr]}{whole[len(text(function)) :]}"
    positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    symmetric = text(function).rpartition(".")[2] in SYMMETRIC
    if len(positional) == len(node.args) and len(positional) >= 2 and not symmetric:
        first, second = positional[-2:] if text(function) == "tl.where" else positional[:2]
        if text(first) != text(second):
            arguments = [text(a) for a in node.args]
            i, j = node.args.index(first), node.args.index(second)
            arguments[i], arguments[j] = arguments[j], arguments[i]
            keywords = [text(keyword) for keyword in node.keywords]
            yield node, f"{text(function)}({', '.join([*arguments, *keywords])})"
    for dropped in node.keywords:
        if dropped.arg == "mask":
            kept = [text(k) for k in node.keywords if k.arg not in ("mask", "other")]
            yield node, f"{text(function)}({', '.join([*map(text, node.args), *kept])})"


def kill(mutant: Mutant, place: Path) -> str:
    """What kills a mutant: the first check that fails, or an exception; "" if it survives.

    It changes this process: call it in a child.
    """
    os.environ["TMPDIR"] = tempfile.tempdir = str(place)
    if mutant.file in REFERENCES:
        return _kill_reference(mutant)
    name = Path(mutant.file).stem
    original = (FOLDER / mutant.file).read_text(encoding="utf-8")
    try:
        with planted(mutant.family, (name, original, mutant.source)) as launchers:
            for checked in kernel_checks(mutant.family, name):
                checked(launchers)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return ""


def _kill_reference(mutant: Mutant) -> str:
    module = importlib.import_module(f"kernels.{mutant.file.removesuffix('.py').replace('/', '.')}")
    try:
        _replace(module, mutant.source)
        for checked in reference_checks(mutant.family):
            checked(None)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return ""


def _replace(module: Any, source: str) -> None:
    """Makes a module's functions and classes those of another source, for all that import them."""
    changed: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source, module.__file__, "exec"), changed)
    for name, value in list(vars(module).items()):
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            value.__code__ = changed[name].__code__
        elif isinstance(value, type) and value.__module__ == module.__name__:
            setattr(module, name, changed[name])


Check = Callable[[Any], None]


def _agrees(op: str, case: Case, dtype: torch.dtype = torch.float32) -> Check:
    def run(launchers: Any) -> None:
        verdicts = check(SPECS[op], case, dtype, CPU)
        failures = [str(verdict) for verdict in verdicts if not verdict.ok]
        assert not failures, failures

    return run


def _guarded(family: str) -> Check:
    """The family's small cases with a guard page after every tensor."""

    def run(launchers: Any) -> None:
        from tests.kernels.test_families import inputs_of, triton
        from tests.memory import guard_allocations, guarded

        with pytest.MonkeyPatch.context() as patch:
            guard_allocations(patch)
            for spec in (spec for spec in SPECS.values() if spec.family == family):
                for case in spec.tagged("small"):
                    if max(case.sizes.values()) <= 130:
                        # With a float32 residual, the norm stores z where y is narrower.
                        dtype = torch.bfloat16 if "residual" in case.options else torch.float32
                        triton(spec, inputs_of(spec, case, dtype), spec.gradients, guarded, guarded)

    return run


def kernel_checks(family: str, name: str) -> list[Check]:
    """The checks of a family's kernels, the fast ones first."""
    specs = [spec for spec in SPECS.values() if spec.family == family]
    if family == "attention":
        from tests.kernels.attention_suite import CHECKS as SUITE

        if name == "decode":
            return [SUITE["decoding"], SUITE["guard pages"]]
        suite = [value for key, value in SUITE.items() if key not in ("far rows", "decoding", "guard pages")]
        cases = [(s.name, c) for s in specs[:2] for c in _up_to(s, 24, "edge")]
        agree = [_agrees(op, case) for op, case in cases]
        return [*suite, *agree, SUITE["guard pages"]]

    from tests.compiled.mutations import CHECKS

    cases = [(s.name, c) for s in specs for c in _up_to(s, 130, "small", "edge")]
    wide = CHECKS[family] if family != "norm" else ()
    narrow = [*cases[:3], *(call for call in cases[3:] if "residual" in call[1].options)]
    half = [_agrees(op, case, torch.bfloat16) for op, case in narrow]
    if name == "gemm":
        checks = [_agrees(op, case) for op, case in cases]
        return [*map(_with_gemm, (*checks, _guarded(family))), _transposed_operands]
    if family == "loss":
        wide = (*wide, _other_ignore_index)
    return [*(_agrees(op, case) for op, case in cases), *half, *wide, _guarded(family)]


def _transposed_operands(launchers: Any) -> None:
    """The matmul of operands whose columns are not adjacent."""
    x, w = torch.linspace(-1, 1, 24 * 20).reshape(20, 24).T, torch.linspace(1, -1, 20 * 40).reshape(20, 40).T
    h, a = torch.empty(24, 40), torch.empty(24, 40)
    launchers.gelu_gemm_forward(x=x, w=w, bias=None, h=h, a=a, tanh=True, tile=Tile(16, 32)).run()
    torch.testing.assert_close(h, x @ w.T, rtol=1e-4, atol=1e-5)


def _with_gemm(checked: Check) -> Check:
    """A check of the matmul with GELU in its epilogue, which no row of the tuning table takes yet."""

    def run(launchers: Any) -> None:
        from kernels.ffn import torch_op

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_op, "gelu_gemm_tile", lambda *_: Tile(16, 32))
            checked(launchers)

    return run


def _other_ignore_index(launchers: Any) -> None:
    """Ignored targets that are ids, and targets outside the vocabulary."""
    x, weight = torch.linspace(-1, 1, 48).reshape(6, 8), torch.linspace(1, -2, 40).reshape(5, 8)
    targets = torch.tensor([0, 2, 4, 2, 1, 3])
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with kernels.use_backend(backend):
            loss = kernels.linear_cross_entropy(*leaves, targets, ignore_index=2, reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    with kernels.use_backend("triton"):
        loss = kernels.linear_cross_entropy(x, weight, torch.tensor([0, 5, -1, 2, -100, 1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False, False, False], loss


def _up_to(spec: Any, size: int, *tags: str) -> list[Case]:
    """The cases of no larger size, small ones first."""
    cases = [case for case in spec.tagged(*tags) if max(case.sizes.values()) <= size]
    return sorted(cases, key=lambda case: math.prod(case.sizes.values()))


def reference_checks(family: str) -> list[Check]:
    """The checks of a family's references: the kernels, and formulas in float64."""
    from tests.scorecard import formulas

    specs = [spec for spec in SPECS.values() if spec.family == family]
    size = 40 if family == "attention" else 130
    cases = [(s.name, c) for s in specs for c in _up_to(s, size, "small")]
    return [*formulas.CHECKS[family], *(_agrees(op, case) for op, case in cases)]


def run(trials: int, seed: int, folder: Path) -> Outcome:
    """Runs a sample of the mutants."""
    from tests.interpreter import patch_interpreter

    if not kernels.dispatch.interpreting:
        return Outcome(note="not run: needs TRITON_INTERPRET=1")
    folder.mkdir(parents=True, exist_ok=True)
    patch_interpreter()
    everything = mutants()
    chosen = sample(everything, trials, seed)
    _warm()
    torch.set_num_threads(1)

    def attack(number: int, say: Say) -> None:
        mutant = chosen[number]
        say(f"{mutant.file}:{mutant.line} {mutant.change}")
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        assert kill(mutant, folder), SURVIVES

    outcome = run_trials(len(chosen), attack, limit=20 * LIMIT, alone=True)
    survivors = [f.removesuffix(f": {SURVIVES}") for f in outcome.failures if f.endswith(f": {SURVIVES}")]
    share = 1 - len(survivors) / max(1, len(chosen))
    outcome.worst = f"{share:.1%} of {len(chosen)} killed"
    equivalent = sum(mutant.equivalent for mutant in everything)
    outcome.note = f"of {len(everything)}; {equivalent} equivalent ones are left out"
    places = [survivor.partition(", ")[2].split(" ")[0] for survivor in survivors]  # file:line
    outcome.note += f"; these survive: {', '.join(places)}" if places else ""
    outcome.failures = survivors if share < KILLED else []
    return outcome


def sample(everything: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """The first mutants in an order that depends on their keys: a larger sample contains a smaller one."""

    def place(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {mutant.key} {mutant.line}".encode()).digest()

    return sorted((mutant for mutant in everything if not mutant.equivalent), key=place)[:count]


def _warm() -> None:
    """Imports and runs once what each child would import again."""
    for family in FILES:
        spec = next(spec for spec in SPECS.values() if spec.family == family)
        _agrees(spec.name, spec.tagged("small")[0])(None)


ROWS: tuple[Row, ...] = (
    Row(
        "kernel-mutants",
        "the checks kill at least 90% of the mutants of kernels and references",
        run,
        trials=30,
        small=2,
        long=1500,
    ),
)
