"""The command. Its functions are in another module: a process that is spawned cannot import this one."""

from __future__ import annotations

import sys

from bench.validate.command import main
from gpt.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("bench.validate", main))
