"""Which mutants of the kernels the interpreter kills, and which the execution of compiled kernels kills.

Usage: python -m tests.compiled.mutants [FAMILY ...]    without a family: all
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.compiled.outcomes import Bug, Check, values
from tests.planting import FILES, Mutation

# Why a mutant survives the execution of compiled kernels.
EXPLAINED = {
    "attention: offsets in 32 bits": "ttsem copies a tensor of 2**31 elements four times",
    "loss: the barriers are lost": "ttsem runs a program's threads in lockstep, and the interpreter does too",
}


def mutants(families: list[str]) -> Iterator[tuple[str, Bug]]:
    """Every mutant's name, and its mutation with the checks of its family."""
    from tests.compiled.mutations import CHECKS, MUTATIONS
    from tests.kernels.test_attention_mutants import FAMOUS, MUTANTS

    for family in families:
        if family == "attention":
            famous = {name: mutation for name, (mutation, _) in FAMOUS.items()}
            for name, mutation in (famous | MUTANTS).items():
                yield f"{family}: {name}", Bug(family, mutation, checks=attention_checks(name, mutation))
        else:
            for name, mutation in MUTATIONS[family].items():
                yield f"{family}: {name}", Bug(family, mutation, checks=CHECKS[family])


def attention_checks(name: str, mutation: Mutation) -> list[Check]:
    """The checks of values in attention_suite; those that probably kill the mutant come first."""
    from tests.kernels.attention_suite import CHECKS

    file, text, _ = mutation
    if file == "decode":
        return [CHECKS["decoding"]]
    needles = {"start": "documents", "keep": "dropout", "drop": "dropout", "stride_dot": "strided gradients"}
    first = [check for needle, check in needles.items() if needle in f"{name} {text}"]
    apart = {"decoding", "guard pages", "far rows"}  # of another kernel; of memory; of 2**31 elements
    checks = [CHECKS[check] for check in dict.fromkeys([*first, *CHECKS]) if check not in apart]
    # A tile of queries in two documents, the later of which starts past whole tiles of keys.
    return [
        *checks,
        values("causal_attention", {"B": 1, "H": 1, "Tq": 70, "Tk": 70, "D": 16}, key_start="documents"),
    ]


def interpret(families: list[str]) -> None:
    """Prints what the interpreter says about each mutant, one JSON list a line."""
    for name, bug in mutants(families):
        print(json.dumps([name, bug.interpreted().strip().rpartition("\n")[2]]), flush=True)


def execute(bug: Bug) -> str:
    """What stops the checks of compiled kernels; "" if nothing does."""
    try:
        return bug.compiled()
    except Exception as error:  # for example a kernel that does not compile
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def main(families: list[str]) -> None:
    """Runs both, and prints a line for each mutant and the totals."""
    from tests.compiled.session import session

    start = time.monotonic()
    command = [sys.executable, "-m", "tests.compiled.mutants", *families]
    child = subprocess.Popen(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    totals: Counter[str] = Counter()
    with session():
        for name, bug in mutants(families):
            compiled = execute(bug)
            interpreted = json.loads(child.stdout.readline())[1]
            killer = {
                (True, True): "both",
                (True, False): "compiled only",
                (False, True): "interpreter only",
                (False, False): "none",
            }[bool(compiled), bool(interpreted)]
            totals[killer] += 1
            reason = "" if compiled else EXPLAINED.get(name, "unexplained")
            print(f"{killer:16} {name}: {compiled or reason} | {interpreted or '-'}"[:200], flush=True)
    print(dict(totals), f"{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run = interpret if os.environ.get("TRITON_INTERPRET") == "1" else main
    run(sys.argv[1:] or list(FILES))
