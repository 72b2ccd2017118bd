"""`python -m gpt`: the commands there are."""

from __future__ import annotations

import kernels

COMMANDS = """\
  gpt.train     trains a GPT on text, without flags on Python's own sources
  gpt.sample    continues a prompt with a trained model
  gpt.eval      loss, perplexity and bits per byte of a text
  gpt.info      parameters, FLOPs and memory of a model; its predicted speed
  kernels       the backend that each op takes on this machine, and why
  bench         measures ops, training, generation; bench.attention: one family"""

if __name__ == "__main__":
    print(f"fused-gpt {kernels.__version__}: python -m COMMAND; --help lists a command's flags\n\n{COMMANDS}")
