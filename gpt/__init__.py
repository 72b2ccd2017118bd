"""A GPT whose fused kernels can be swapped for plain PyTorch at run time, with tokenizers and a trainer."""

import sys

from gpt.interrupts import exit_on_interrupt

if sys.argv[:1] == ["-m"] and any(name.removeprefix("-m").startswith("gpt.") for name in sys.orig_argv):
    exit_on_interrupt()  # `python -m gpt.…` imports this package first, and torch takes seconds

import kernels

if not hasattr(kernels, "causal_attention"):
    raise ImportError(
        f"gpt: the package `kernels` at {kernels.__path__[0]} is not fused-gpt's (Hugging Face has a "
        "package of that name): run `pip uninstall kernels`, then install fused-gpt again"
    )

from gpt.config import GPTConfig, TrainConfig
from gpt.data.dataset import DataConfig, TokenData
from gpt.data.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer
from gpt.errors import InputError
from gpt.model import GPT
from gpt.training.fit import EarlyStopping
from gpt.training.trainer import Trainer
from gpt.weights.pretrained import load_pretrained_tokenizer
from kernels import __version__

__all__ = [
    "GPT",
    "BPETokenizer",
    "CharTokenizer",
    "DataConfig",
    "EarlyStopping",
    "GPTConfig",
    "InputError",
    "TokenData",
    "TrainConfig",
    "Trainer",
    "__version__",
    "load_pretrained_tokenizer",
    "load_tokenizer",
]
