"""`python -m gpt.info`: what a model is made of, and what it costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.cli import OptionParser, run_command
from gpt.config import GPTConfig, override
from gpt.weights import checkpoint

MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("gpt.info", _info, argv)


def _info(argv: Sequence[str]) -> int:
    parser = OptionParser(
        "python -m gpt.info",
        "Parameters by component, bytes, FLOPs and memory of a model.",
        model=GPTConfig(),
    )
    parser.add_argument("target", metavar="PRESET|DIR", help="a preset, a run's folder or a checkpoint")
    arguments, flags = parser.parse_tables(argv)
    config = override(_config(arguments.target), flags["model"])
    print(report(config))
    return 0


def _config(target: str) -> GPTConfig:
    if Path(target).is_dir():
        return GPTConfig.from_dict(
            checkpoint.read_json(checkpoint.find_checkpoint(target) / checkpoint.CONFIG)
        )
    return GPTConfig.preset(target)


def report(config: GPTConfig) -> str:
    """The table that the command prints."""
    counts = config.parameter_counts()
    rows = [
        ("embeddings", counts["token_embedding"] + counts["position_embedding"]),
        ("  of tokens", counts["token_embedding"]),
        ("  of positions", counts["position_embedding"]),
        ("block", counts["block"]),
        (f"{config.n_layer} blocks", config.n_layer * counts["block"]),
        ("final norm", counts["final_norm"]),
        ("head" + (" (the token embedding's weight)" if config.tie_weights else ""), counts["head"]),
        ("total", counts["total"]),
    ]
    lines = [f"{'':<38}{'parameters':>16}{'MiB in float32':>16}"]
    lines += [f"{name:<38}{count:>16,}{4 * count / MIB:>16,.2f}" for name, count in rows]
    fixed = config.training_bytes(0)
    sequence = config.training_bytes(1) - fixed
    return "\n".join(
        [
            *lines,
            "",
            f"{config.flops_per_token() / 1e6:,.1f} MFLOP per token, forward and backward, at context T = "
            f"{config.block_size}:",
            "  6 N + 12 n_layer n_head D T, N without embeddings that are only looked up",
            f"{fixed / MIB:,.0f} MiB to train in float32 with AdamW, {sequence / MIB:,.1f} MiB more per "
            "sequence of a batch:",
            "  16 bytes a parameter, 4 n_layer T (6 C + 4 n_head D + 2 I) for backward; one chunk of logits "
            "comes on top",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
