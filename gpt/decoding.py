"""Decoding: the step for one more token, which a GPU captures as a CUDA graph and keeps for the model.

All counters, ids and settings of sampling are on the device. So each step is the same sequence of launches,
and the host does not synchronise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from gpt.block import Attention, Block, FeedForward, Linear, Norm, fuses_decoding
from gpt.config import GPTConfig
from gpt.cuda_graph import captured
from gpt.head import TiedHead
from gpt.inputs import positions
from gpt.kept import borrow, fits
from gpt.kv_cache import KVCache
from gpt.model import GPT
from gpt.sampler import Form, Sampler, checked_once, drawing

OWN = frozenset(vars(nn.Module()))  # the attributes of every module, such as `training`
PLAIN = (GPT, nn.Embedding, nn.ModuleList, Block, Norm, Attention, FeedForward, Linear, TiedHead)
Logits = Callable[[Tensor, KVCache], Tensor]


class Decoder:
    """Continues prompts by one token at a time, in tensors that stay where they are from prompt to prompt.

    Args:
        model: What decodes. The decoder keeps no reference to it.
        form: What a choice of tokens runs.
        batch: B.
        size: The largest number of tokens whose keys are cached, prompt included.
        padded: Whether prompts may have padding.
        captures: Whether steps are captured, from the second one on.
    """

    def __init__(
        self, model: GPT, form: Form, batch: int, size: int, *, padded: bool, captures: bool
    ) -> None:
        config, device = model.config, model.device
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.cache = KVCache(config.n_layer, batch, size, padded=padded, device=device)
        self.sampler = Sampler(form, batch, config.vocab_size, dtype=dtype, device=device)
        self.nbytes = cache_bytes(model, batch, size)
        self.length = 0  # of the prompt and the tokens after it
        self.intact = True
        self._ids = torch.zeros(batch, size + 1, dtype=torch.int64, device=device)
        self._captures, self._warm = captures, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._generator = torch.Generator(device)  # of the graph

    @property
    def ids(self) -> Tensor:
        """The prompt and the tokens after it, (B, length). The next step, or prompt, overwrites them."""
        return self._ids[:, : self.length]

    def start(
        self, model: GPT, idx: Tensor, key_start: Tensor | None, generator: torch.Generator | None
    ) -> None:
        """Takes a prompt (B, T), T <= size, and chooses the token after it."""
        T, self.intact = idx.shape[1], False
        self.cache.start(T, key_start)
        self._ids[:, :T] = idx
        states = model.hidden(idx, positions(T, key_start, idx.device), key_start, cache=self.cache)
        self.cache.end_prompt()
        self.sampler.choose(model.head(states[:, -1]), generator)
        self._append()
        self.length, self.intact = T + 1, True

    def step(self, logits: Callable[[], Logits], generator: torch.Generator | None) -> None:
        """Chooses the next token. `logits` returns what `decoding_step` does; a replay does not call it."""
        self.intact = False
        if not self._captures or not self._warm:
            self._warm = True  # the first step compiles kernels and fills the allocator's pools
            self._run(logits(), generator)
        else:
            if self._graph is None:
                self._graph = self._capture(logits())
            self._replay(self._graph, generator)
        self.length, self.intact = self.length + 1, True

    def _run(self, logits: Logits, generator: torch.Generator | None) -> None:
        row = logits(self.sampler.token, self.cache)  # (B, V)
        self.sampler.choose(row, generator)  # right after the head: the two kernels overlap
        self.cache.advance()
        self._append()

    def _append(self) -> None:
        self._ids.index_copy_(1, self.cache.index, self.sampler.token[:, None])

    def _capture(self, logits: Logits) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        if self.sampler.form.do_sample:
            graph.register_generator_state(self._generator)
        with captured(graph, _capture_stream(self._ids.device)):
            self._run(logits, self._generator)
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, generator: torch.Generator | None) -> None:
        """Replays a step. It draws from the state of `generator` and advances it, as an eager step does."""
        if not self.sampler.form.do_sample:
            graph.replay()
            return
        generator = _default_generator(self._ids.device) if generator is None else generator
        with drawing:
            self._generator.set_state(generator.get_state())
            graph.replay()
            generator.set_state(self._generator.get_state())


@contextmanager
def lend(
    model: GPT, form: Form, batch: int, length: int, *, padded: bool, use_cache: bool
) -> Iterator[Decoder]:
    """A decoder for one `generate`, which the caller has for itself inside the block.

    On a GPU it is one that the model keeps, with its graph, if the graph will be right as long as the model's
    parameters stay in place: if the model is plain. Its cache has space for block_size tokens.

    Args:
        model: What decodes.
        form: What a choice of tokens runs.
        batch: B.
        length: The largest number of tokens, prompt included.
        padded: Whether prompts may have padding.
        use_cache: False if no step uses the cache.
    """
    block, device = model.config.block_size, model.device
    capturing, modules = use_cache and captures(device), list(model.modules())
    plain = capturing and _are_plain(modules)
    if not (plain and fits(cache_bytes(model, batch, block))):
        capturing = capturing and (plain or not kernels.has_hooks(model))
        yield Decoder(model, form, batch, min(block, length), padded=padded, captures=capturing)
        return

    modes = (
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        kernels.backend_settings(),
    )
    # A decoder stays on one stream: its next prompt cannot overwrite what the last one still reads.
    key = form, batch, padded, torch.cuda.current_stream(device), modes

    def make() -> Decoder:
        return Decoder(model, form, batch, block, padded=padded, captures=True)

    with borrow(model, key, _state(model.config, modules), make) as decoder:
        yield decoder


def decoding_step(model: GPT, batch: int) -> Logits:
    """The function of a decoding step: logits (B, V) after tokens (B,), which it adds to a cache.

    For a few sequences and a plain GPT-2, it calls the fused ops of decoding, otherwise the modules one by
    one. It looks the parameters up once, so it is for one `generate`.
    """
    if batch > kernels.DECODE_BATCH or not _fuses(model) or model.ln_f is None:
        return lambda token, cache: _logits_of_modules(model, token, cache)

    embedding = {"token_weight": model.wte.weight, "position_weight": model.wpe.weight}
    blocks = [block.decoding_arguments() for block in model.blocks if isinstance(block, Block)]
    head: dict[str, Any] = {
        "norm_weight": model.ln_f.weight,
        "norm_bias": model.ln_f.bias,
        "head_weight": model.head_weight,
        "head_bias": model.lm_head.bias,
        "eps": model.ln_f.eps,
    }

    names = "decode_embedding", "decode_block", "decode_head"
    decode_embedding, decode_block, decode_head = map(checked_once, names)

    def logits(token: Tensor, cache: KVCache) -> Tensor:
        x = decode_embedding(token, cache.lengths, **embedding, key_start=cache.key_start)  # (B, C)
        for (keys, values), arguments in zip(cache.layers, blocks, strict=True):
            x = decode_block(x, keys, values, cache.lengths, **arguments, key_start=cache.key_start)
        return decode_head(x, **head)

    return logits


def _logits_of_modules(model: GPT, token: Tensor, cache: KVCache) -> Tensor:
    """A decoding step that calls the model's modules."""
    states = model.hidden(token[:, None], cache.position, None, cache=cache)  # (B, 1, C)
    return model.head(states[:, -1])


def _fuses(model: GPT) -> bool:
    """Whether the fused ops of decoding compute what the modules of `model` do."""
    modules, dtype = list(model.modules()), model.dtype
    return (
        fuses_decoding(model.config)
        and not torch.is_autocast_enabled(model.device.type)
        and _are_plain(modules)
        and len({norm.eps for norm in modules if isinstance(norm, Norm)}) == 1
        and all(p.dtype == dtype and p.is_contiguous() for p in _parameters(modules))
    )


def captures(device: torch.device) -> bool:
    """Whether steps on `device` are captured: on a GPU without autocast.

    Autocast caches casted weights, which the replay of a graph would not update.
    """
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


def cache_bytes(model: GPT, batch: int, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens in each row."""
    config = model.config
    return 2 * config.n_layer * batch * config.n_head * tokens * config.head_size * model.dtype.itemsize


def _are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether all modules are those of this package, without hooks."""
    return all(kernels.is_plain(module, *PLAIN) for module in modules)


def _parameters(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of all modules of a model; torch's own iterator walks the tree of modules again."""
    return (p for module in modules for p in module._parameters.values() if p is not None)


def _state(config: GPTConfig, modules: Sequence[nn.Module]) -> Hashable:
    """What a graph has read of a plain model when it was captured: it is right while this stays equal."""
    parameters = [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in _parameters(modules)]
    settings = [(id(module), type(module), *_settings(module)) for module in modules]
    return config, tuple(parameters), tuple(settings)


def _settings(module: nn.Module) -> list[object]:
    """The attributes that a module's forward may read, such as `eps`; a GPT's own decide nothing here."""
    if isinstance(module, GPT):
        return []
    attributes = vars(module).items()
    return [value for name, value in attributes if name not in OWN and isinstance(value, (str, int, float))]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on `device`; torch's default is on the device of the first capture."""
    return torch.cuda.Stream(device)


def _default_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
