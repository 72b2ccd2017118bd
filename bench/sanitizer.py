"""`python -m bench.sanitizer TOOL`: runs each call of `bench.safety` once under a tool of compute-sanitizer.

A report about a kernel of this package fails the run. Reports about other kernels (of torch or cuBLAS) are
counted by kernel name.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.command import check_names, parse_budget, say
from bench.machine import describe
from bench.record import Report
from gpt.cli import OptionParser, option, run_command
from gpt.errors import InputError
from kernels.registry import SPECS

TOOLS = {  # the flags of each
    "memcheck": ("--padding", "256", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
COMMON = (
    *("--target-processes", "application-only"),
    *("--launch-timeout", "0"),
    *("--show-backtrace", "no"),
    *("--print-limit", "10000"),
)
# Without torch's caching allocator, whose blocks hide accesses past a tensor and uninitialised memory.
UNCACHED = ("memcheck", "initcheck")
PREFIX = "========="
SHOWN = 5  # reports that are printed in full


@dataclass(frozen=True)
class Options:
    """Flags."""

    op: tuple[str, ...] = option(tuple(SPECS), "ops")
    budget: str | None = option(None, "as in 90s or 8m: leave out the least important calls beyond it")
    json: str | None = option(None, "write what was found to this file")


def main(argv: Sequence[str]) -> int:
    parser = OptionParser("python -m bench.sanitizer", __doc__ or "", arguments="TOOL", options=Options())
    parser.add_argument("tool", metavar="TOOL", help=", ".join(TOOLS))
    given, values = parser.parse_tables(argv)
    options = Options(**values["options"])
    check_names("TOOL", [given.tool], TOOLS)
    check_names("--op", options.op, SPECS)
    parse_budget(options.budget)
    program = find()
    if program is None:
        raise InputError("compute-sanitizer was not found, expected it on the PATH or in /usr/local/cuda/bin")
    if not torch.cuda.is_available():
        raise InputError("no GPU was found, expected one: kernels run compiled here")
    report = Report(shlex.join(["python", "-m", "bench.sanitizer", *argv]), describe(torch.device("cuda")))
    code = run(given.tool, command(program, given.tool, options), report)
    if options.json is not None:
        report.save(options.json)
    return code


def find() -> str | None:
    """The path of compute-sanitizer; None if it is not installed."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def command(program: str, tool: str, options: Options) -> list[str]:
    safety = [sys.executable, "-m", "bench.safety", "--repeats", "0", "--op", *options.op]
    # initcheck does not see cuBLAS's stores: it would report every read of a matmul's result.
    if tool == "initcheck":
        safety.append("--zero_matmuls")
    budget = [] if options.budget is None else ["--budget", options.budget]
    return [program, "--tool", tool, *COMMON, *TOOLS[tool], "--", *safety, *budget]


def run(tool: str, line: Sequence[str], report: Report) -> int:
    """Runs the sanitizer, notes its reports, and returns the exit code."""
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in UNCACHED else {})
    names, about_ours, others, summary = kernel_names(), Counter[str](), Counter[str](), False

    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for block in blocks(process.stdout):
            places = [part for part in block[1:] if "+0x" in part]
            text = "\n  ".join([block[0], *places])
            if len(block) == 1 and "+0x" not in text:
                summary = summary or "SUMMARY" in text
                print(PREFIX, text, flush=True)
            elif not names & set(re.findall(r"\w+", text)):
                others[kernel(text)] += 1
            else:
                if text not in about_ours and len(about_ours) < SHOWN:
                    print(f"{tool}: {text}", flush=True)
                about_ours[text] += 1

    failed = process.returncode != 0 or not summary
    if failed:
        say(report, f"ended with exit code {process.returncode}{'' if summary else ' and without a summary'}")
    listed = "".join(f"; {name}: {count}" for name, count in others.most_common(SHOWN))
    say(
        report,
        f"{about_ours.total()} reports about this package's kernels, {others.total()} about others{listed}",
    )
    for text, count in about_ours.most_common(SHOWN):
        say(report, f"{count} times: {' '.join(text.split())}")
    report.complete = not failed
    return 1 if about_ours or failed else 0


def blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Splits the sanitizer's output into reports: a line with PREFIX and the indented lines below it.

    Lines without PREFIX come from the program and are printed.
    """
    block: list[str] = []
    for line in map(str.rstrip, lines):
        if not line.startswith(PREFIX):
            print(line, flush=True)
            continue
        text = line.removeprefix(PREFIX)
        if text.startswith("  "):
            block.append(text.strip())
            continue
        if block:
            yield block
        block = [text.strip()] if text.strip() else []
    if block:
        yield block


def kernel(report: str) -> str:
    """The name of the kernel in a report, without its arguments."""
    match = re.search(r"\bat (?:void )?([\w:~$]+)", report)
    return match[1].rpartition("::")[2] if match else report.splitlines()[0]


def kernel_names() -> set[str]:
    """The names of this package's kernels."""
    source = Path(__file__).parent.parent / "kernels"
    return {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text("utf-8"), re.M)
    }


if __name__ == "__main__":
    sys.exit(run_command("bench.sanitizer", main))
