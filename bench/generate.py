"""`python -m bench.generate`: time to the first token and time per decoded token, at batch sizes 1, 64, 8.

Each decoding step must read every weight and the cache once. "% limit" is the time of that, at the measured
copy rate, over the time measured. On a CPU, the same weights in bfloat16 and int8 take part too.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import table
from bench.command import parse_budget, say, start_report
from bench.contestants import OURS, Contestant, first_sentence, optional
from bench.machine import bench_device
from bench.measure import Ceilings, Clock, Lane, Timing, interleave, release
from bench.record import Row
from gpt.cli import OptionParser, option, run_command
from gpt.config import GPTConfig
from gpt.errors import InputError
from gpt.model import GPT
from gpt.packing import FORMATS, pack_weights
from kernels.spec import SHORT_DTYPE

PLAIN = "plain PyTorch"
NO_CACHE = f"{OURS}, no cache"
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # largest relative RMS error of the kernels' logits
PACKED = {f"{OURS} {format}": format for format in FORMATS}  # contestants on a CPU
AGREE_PACKED = 0.05  # with float32
Generate = Callable[[torch.Tensor, int], Any]


@dataclass(frozen=True)
class Options:
    """Flags."""

    quick: bool = option(False, "batch 1 alone, for a short time")
    preset: str | None = option(None, "of the model (default: gpt2 on a GPU, char-cpu on a CPU)")
    prompt_tokens: int | None = option(None, "in the prompt (default: 128, or a quarter of the block)")
    new_tokens: int | None = option(None, "after the first one (default: 128, or half of the block)")
    no_cache: bool = option(False, "this package without its KV cache takes part too")
    batch_size: tuple[str, ...] = option(("1", "64", "8"), "sequences, the most important first")
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)")
    budget: str | None = option(None, "as in 90s or 8m: leave out the last batch sizes beyond it")
    json: str | None = option(None, "write every figure to this file, as they come")


def main(argv: Sequence[str]) -> int:
    _, values = OptionParser("python -m bench.generate", __doc__ or "", options=Options()).parse_tables(argv)
    options = Options(**values["options"])
    budget, began = parse_budget(options.budget), time.monotonic()
    for text in options.batch_size:
        if not text.isdecimal() or int(text) == 0:
            raise InputError(f"--batch_size is {text!r}, expected integers > 0")

    clock = Clock(bench_device(options.device))
    config = GPTConfig.preset(options.preset or ("gpt2" if clock.on_gpu else "char-cpu"))
    dtype = torch.bfloat16 if clock.on_gpu else torch.float32
    lengths = _lengths(options, config)
    report = start_report("bench.generate", argv, clock)
    ceilings = Ceilings(clock, 0.1)
    contestants = entrants(config, dtype, clock, no_cache=options.no_cache)

    sizes = [int(text) for text in options.batch_size][: 1 if options.quick else None]
    longest = 0.0
    for number, batch in enumerate(sizes):
        begin = time.monotonic()
        if budget is not None and number > 0 and begin + longest > began + budget:
            say(report, f"left out for the budget: batch sizes {', '.join(map(str, sizes[number:]))}")
            break
        rows = race(
            config=config,
            dtype=dtype,
            batch=batch,
            lengths=lengths,
            contestants=contestants,
            clock=clock,
            ceilings=ceilings,
            seconds=0.3 if options.quick else 2.0,
        )
        report.rows += rows
        report.ceilings = ceilings.measured()
        print("\n" + table.race(rows), flush=True)
        if options.json is not None:
            report.save(options.json)
        longest = max(longest, time.monotonic() - begin)

    report.complete = True
    if options.json is not None:
        report.save(options.json)
    return 1 if any(row.status == "wrong" for row in report.rows) else 0


def _lengths(options: Options, config: GPTConfig) -> tuple[int, int]:
    """Tokens of the prompt, and tokens generated after the first one."""
    block = config.block_size
    prompt = min(128, block // 4) if options.prompt_tokens is None else options.prompt_tokens
    new = min(128, block // 2) if options.new_tokens is None else options.new_tokens
    if prompt < 1 or new < 1 or prompt + 1 + new > block:
        raise InputError(
            f"--prompt_tokens {prompt}, the first token and --new_tokens {new} are {prompt + 1 + new} "
            "tokens, "
            f"expected at least one of each and at most {block} together (block_size)"
        )
    return prompt, new


def entrants(
    config: GPTConfig, dtype: torch.dtype, clock: Clock, *, no_cache: bool = False
) -> list[Contestant]:
    """Models with random weights; ours are refused as wrong if their logits are far from the references'."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the op benches report what cannot run Triton here
        model = GPT(
            config, use_triton=True if clock.on_gpu else "auto", device=clock.device, dtype=dtype
        ).eval()

    contestants = [Contestant(OURS, _ours(model, model.use_triton), peer=False)]
    problem = _disagreement(model, dtype)
    if problem:
        contestants = [Contestant(OURS, None, absent=problem, peer=False)]
    elif no_cache:
        contestants.append(Contestant(NO_CACHE, _ours(model, model.use_triton, use_cache=False), peer=False))
    if clock.on_gpu:
        contestants.append(Contestant(PLAIN, _ours(model, False), peer=False))
    else:
        contestants += [_packed(model, name, format) for name, format in PACKED.items()]
    return [*contestants, optional("transformers", lambda: _transformers(config, dtype, clock.device))]


def _ours(model: GPT, use_triton: bool | str, *, use_cache: bool = True) -> Generate:
    def generate(ids: torch.Tensor, count: int) -> Any:
        model.use_triton = use_triton
        return model.generate(ids, count, do_sample=False, use_cache=use_cache)

    return generate


def _packed(model: GPT, name: str, format: str) -> Contestant:
    """The same weights, packed."""
    packed = pack_weights(copy.deepcopy(model), format)
    ids = _ids(model, 64)
    with torch.no_grad():
        error = _relative_error(packed(ids), model(ids))
    if error > AGREE_PACKED:
        problem = f"the logits have a relative error of {error:.2g}, expected at most {AGREE_PACKED}"
        return Contestant(name, None, absent=problem, peer=False)
    return Contestant(name, _ours(packed, "auto"), peer=False)


def _transformers(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Generate:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(theirs).to(device, dtype).eval()

    def generate(ids: torch.Tensor, count: int) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    return generate


def _disagreement(model: GPT, dtype: torch.dtype) -> str:
    """How far the logits of the kernels are from those of the references; "" if they agree."""
    chosen = model.use_triton
    ids = _ids(model, model.config.block_size if model.device.type == "cuda" else 64)
    with torch.no_grad():
        actual = model(ids)
        model.use_triton = False
        error = _relative_error(actual, model(ids))
    model.use_triton = chosen
    return (
        ""
        if error <= AGREE[dtype]
        else f"the kernels' logits have a relative error of {error:.2g}, expected at most {AGREE[dtype]}"
    )


def _ids(model: GPT, tokens: int) -> torch.Tensor:
    """Two rows of random ids, on the model's device."""
    generator = torch.Generator().manual_seed(0)
    size = 2, min(tokens, model.config.block_size)
    return torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The RMS of the difference over the RMS of `expected`."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def race(
    config: GPTConfig,
    dtype: torch.dtype,
    batch: int,
    lengths: tuple[int, int],
    contestants: Sequence[Contestant],
    clock: Clock,
    ceilings: Ceilings,
    seconds: float,
) -> list[Row]:
    """The rows of one batch size: the first token, and each later one.

    Args:
        lengths: Tokens of the prompt, and tokens generated after the first one.
        seconds: How long each contestant is sampled.
    """
    prompt, new = lengths
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (batch, prompt), generator=generator).to(clock.device)
    case = f"{config.n_layer}x{config.n_embd}-V{config.vocab_size}-B{batch}-T{prompt}-new{new}"
    template = Row(
        op="generate",
        case=case,
        dtype=SHORT_DTYPE[dtype],
        direction="first token",
        contestant="",
        status="absent",
        tokens=batch * prompt,
    )

    rows: list[Row] = []
    lanes: dict[str, Lane] = {}
    for contestant in contestants:
        status, reason = _try(contestant, ids, clock)
        if status == "measured":
            lanes[f"{contestant.name}/1"] = _lane(contestant, ids, 1)
            lanes[f"{contestant.name}/n"] = _lane(contestant, ids, 1 + new)
        else:
            rows.append(replace(template, contestant=contestant.name, status=status, reason=reason))

    timings = interleave(lanes, clock, seconds) if lanes else {}
    names = [c.name for c in contestants if f"{c.name}/1" in timings]
    for name in names:
        rows.append(replace(template, contestant=name).measured(timings[f"{name}/1"]))

    for name in names:
        sizes = {"bfloat16": (2, 2), "int8": (1, 4)}.get(PACKED.get(name, ""), (dtype.itemsize,) * 2)
        nbytes = decode_bytes(config, batch, prompt + new // 2, *sizes)
        limit = nbytes / ceilings.copy()
        decoding = replace(template, direction="decode", tokens=batch, bytes=nbytes, limit=limit)
        first, whole = timings[f"{name}/1"].median, timings[f"{name}/n"]
        median, low, high = ((seconds - first) / new for seconds in whole[:3])
        rows.append(replace(decoding, contestant=name).measured(Timing(median, low, high, whole.samples)))
    release(clock)
    return rows


def decode_bytes(config: GPTConfig, batch: int, context: int, weight_size: int, cache_size: int) -> int:
    """Bytes that one decoding step reads: every weight, and the cache of `context` tokens in each row.

    The sizes are bytes of an element.

    The position embedding and an untied token embedding are left out: only one row of each is read.
    """
    counts = config.parameter_counts()
    weights = (
        counts["total"]
        - counts["position_embedding"]
        - (0 if config.tie_weights else counts["token_embedding"])
    )
    cache = 2 * config.n_layer * config.n_head * config.head_size * batch * context
    return weights * weight_size + cache * cache_size


def _try(contestant: Contestant, ids: torch.Tensor, clock: Clock) -> tuple[str, str]:
    """Runs a contestant once at this batch size, and returns (status, reason)."""
    if contestant.function is None:
        return ("absent" if contestant.peer else "wrong"), contestant.absent
    clock.synchronize()
    try:
        with clock.active():
            contestant.function(ids, 2)
            clock.synchronize()
    except torch.OutOfMemoryError:
        release(clock)
        return "failed", "out of memory"
    except Exception as error:  # third-party models raise all kinds of exceptions
        clock.synchronize()
        return "unavailable" if contestant.peer else "failed", first_sentence(error)
    return "measured", ""


def _lane(contestant: Contestant, ids: torch.Tensor, count: int) -> Lane:
    function = contestant.function
    assert function is not None
    return Lane([lambda: function(ids, count)])


if __name__ == "__main__":
    sys.exit(run_command("bench.generate", main))
