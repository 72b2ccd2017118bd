"""The GPT: token and position embeddings, blocks (see `gpt.block`), and the head.

Shapes: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

import kernels
from gpt.block import Block, Linear, Norm, Pass, Seed, add, add_norm, checkpointed, dropout, site_seeds
from gpt.config import GPTConfig, resolve
from gpt.data.tokenizers import Tokenizer
from gpt.device import find_device, parameter_dtype
from gpt.errors import InputError, unknown
from gpt.head import TiedHead, cross_entropy
from gpt.inputs import check_document_start, padding, positions, target_ids, token_ids
from gpt.kept import clear
from gpt.kv_cache import KVCache
from gpt.names import also_named
from gpt.packing import check_conversion
from gpt.preflight import preflight

Callback = Callable[["GPT", int], object]


class GPT(nn.Module):
    """A GPT whose fused ops run in Triton or in plain PyTorch, with the same parameters.

    Args:
        config: A GPTConfig, a dict for `GPTConfig.from_dict`, or the name of a preset. Without it, the
            overrides are such a dict, and GPTConfig's defaults (GPT-2 124M) apply to the rest.
        use_triton: False for the references, True for kernels wherever they apply, "auto" for the faster of
            the two. It can be changed at any time.
        device, dtype: Of the parameters, also as text, as in "cuda" and "bfloat16". None is torch's default.
        **overrides: Fields of GPTConfig to change.

    Raises:
        InputError: The config is invalid, use_triton is another value, or this machine has no such device.
    """

    fuses: ClassVar = {"ln_f": (Norm,), "lm_head": (Linear, TiedHead)}

    def __init__(
        self,
        config: GPTConfig | Mapping[str, Any] | str | None = None,
        *,
        use_triton: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.config = config = resolve(config, overrides)
        self.dropout_seed: Seed = None
        self.checkpoint_activations = False  # True recomputes each block in the backward pass of training
        self.train_loss: list[float] = []  # one entry for each epoch of the last `fit`
        self.validation_loss: list[float] = []

        with torch.device("meta"):
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = Norm(config) if config.final_norm else None
            tied, C, V = config.tie_weights, config.n_embd, config.vocab_size
            self.lm_head = TiedHead(config) if tied else Linear(C, V, bias=config.head_bias)
        self.to(dtype=parameter_dtype(dtype)).to_empty(device=find_device(device))
        self.reset_parameters()
        self.use_triton = use_triton

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as GPT-2: matrices from N(0, 0.02²), biases 0, norms 1.

        The last matrix of each branch has the standard deviation 0.02 / sqrt(2 n_layer).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                last = name.endswith(("attn.proj.weight", "ffn.down.weight"))
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02)

    @property
    def use_triton(self) -> bool | str:
        """False, True or "auto". True warns with a FallbackWarning if a reference has to run instead."""
        return self._use_triton

    @use_triton.setter
    def use_triton(self, value: bool | str) -> None:
        if not isinstance(value, bool) and value != "auto":
            raise InputError(f"GPT: use_triton is {value!r}, expected True, False or 'auto'")
        self._use_triton = value
        if value is True:
            kernels.warn_if_unavailable(self.device, self.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.wte.weight.dtype

    @property
    def max_seq_len(self) -> int:
        """The longest input, in tokens."""
        return self.config.block_size

    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        return f"{self.num_parameters():,} parameters, use_triton={self.use_triton!r}"

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_start: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, or the mean cross-entropy of `targets`.

        Args:
            idx: int64 or int32 (B, T), ids in [0, V), T <= block_size.
            targets: int64 or int32 (B, T), the next token of each position; -100 is ignored. They are not
                shifted here.
            attention_mask: (B, T), 0 for padding, 1 for tokens. Padding is on the left. Positions count from
                the first token.
            document_start: int32 (B, T), the index of the first token of each token's document. Attention
                stays within a document, and positions restart in each.

        Returns:
            (B, T, V) logits; with targets the loss alone, a float32 scalar: the logits are never in memory.

        Raises:
            InputError: An argument has another type, shape or device; T > block_size; padding is not on the
                left; both attention_mask and document_start are given. On a CPU also: an id is outside
                [0, V), or a document_start is after its token.
        """
        idx = token_ids(idx, self.config.vocab_size, self.device)
        targets = None if targets is None else target_ids(targets, idx)
        if idx.shape[1] > self.config.block_size:
            raise InputError(
                f"GPT: idx has {idx.shape[1]} tokens, expected at most {self.config.block_size} (block_size)"
            )
        if attention_mask is not None and document_start is not None:
            raise InputError(
                "GPT: attention_mask and document_start are both given, expected at most one of them"
            )

        key_start = None
        if attention_mask is not None:
            key_start = padding(attention_mask, idx)
        elif document_start is not None:
            check_document_start(document_start, idx)
            key_start = document_start

        position = positions(idx.shape[1], key_start, idx.device)  # (T,) or (B, T)
        with self.backend():
            x = self.hidden(idx, position, key_start, self.config.dropout if self.training else 0.0)
            if targets is None:
                return self.head(x)  # (B, T, C) -> (B, T, V)
            if kernels.is_plain(self.lm_head, Linear, TiedHead):
                return kernels.linear_cross_entropy(x, self.head_weight, targets, self.lm_head.bias)
            return cross_entropy(self.head(x), targets)

    def hidden(
        self,
        idx: Tensor,
        position: Tensor,
        key_start: Tensor | None,
        dropout_p: float = 0.0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The input (B, T, C) of the head, for token ids (B, T) at positions (T,) or (B, T)."""
        seeds = site_seeds(self.dropout_seed if dropout_p else None, self.config.n_layer)
        run = Pass(idx.shape, key_start, self.config.residual, dropout_p, seeds, cache)

        x = self.wte(idx) + self.wpe(position)  # (B, T, C)
        x = dropout(x, dropout_p, seeds[-2]).flatten(0, 1)  # (N, C), N = B T
        branch = None  # (N, C), what the previous block has left to add to x
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            branch, x = checkpointed(block, branch, x, run) if recompute else block(branch, x, run)

        if self.ln_f is not None:
            x = self.ln_f(x) if branch is None else add_norm(self.ln_f, x, branch, run, seeds[-1])[0]
        elif branch is not None:
            x = add(x, branch, run, seeds[-1])
        return x.view(*idx.shape, self.config.n_embd)  # (B, T, C)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        tied = isinstance(self.lm_head, TiedHead)
        return self.lm_head(x, self.head_weight) if tied else self.lm_head(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, C), which is the token embedding's if the head is tied."""
        if not isinstance(self.lm_head, TiedHead):
            return self.lm_head.weight
        if isinstance(self.wte, nn.Embedding):
            return self.wte.weight
        return self.wte(torch.arange(self.config.vocab_size, device=self.wte.weight.device))  # of an adapter

    def backend(self) -> kernels.model_backend:
        """The context in which the ops run on the backend that `use_triton` names."""
        return kernels.model_backend(self._use_triton)

    def fit(
        self,
        train_loader: Iterable[Sequence[Tensor]],
        valid_loader: Iterable[Sequence[Tensor]] | None = None,
        *,
        num_epoch: int = 1,
        learning_rate: float = 1e-3,
        callbacks: Sequence[Callback] | Callback = (),
    ) -> None:
        """Trains with AdamW, on a GPU if there is one, and leaves each epoch's mean loss in the model.

        The losses are in `train_loss` and `validation_loss`, one entry for each epoch.

        Args:
            train_loader: Batches (inputs, targets), int64 or int32 (B, T) each, as a DataLoader yields them.
                A target of -100 is ignored. For several epochs, it must give them at each iteration.
            valid_loader: Batches to validate on after each epoch.
            num_epoch: Passes over `train_loader`.
            learning_rate: Constant.
            callbacks: One or several, called as callback(model, epoch) after each epoch; epochs count from 1.
                Training ends when one returns a true value.

        Raises:
            InputError: A setting outside its range, or a loader that yields something else or nothing.
            NonFiniteError: A loss or a gradient is not finite. That step changes nothing.
        """
        from gpt.training.fit import fit

        fit(
            self,
            train_loader,
            valid_loader,
            num_epoch=num_epoch,
            learning_rate=learning_rate,
            callbacks=callbacks,
        )

    @also_named(x="idx", input_ids="idx")
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        *,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        vocab_size: int | None = None,
        stop_tokens: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """`idx` continued by up to `max_new_tokens` tokens, without dropout.

        The logits pass through vocab_size, repetition_penalty, temperature, top_k, top_p and min_p, in this
        order. On a GPU, the model keeps the CUDA graph of a step for later calls: see `clear_cache`.

        Args:
            idx: int64 or int32 (B, T), also as x= or input_ids=. The model sees its last block_size tokens.
            max_new_tokens: >= 0.
            do_sample: False takes the likeliest token and ignores temperature, top_k, top_p and min_p.
            temperature: Divides the logits, > 0.
            top_k: Keeps the k likeliest tokens.
            top_p: In (0, 1]: keeps the fewest of the likeliest tokens whose probabilities sum to p or more.
            min_p: In [0, 1]: keeps the tokens at least p times as likely as the likeliest.
            repetition_penalty: > 0; above 1 makes tokens that a row already has less likely. Padding does not
                count.
            vocab_size: > 0: only ids below it are generated, for a vocabulary that is padded for speed.
            stop_tokens: Ids that end a row. The row is then filled with the stop token that it met, and
                generation ends when all rows have ended.
            attention_mask: (B, T), 0 for padding on the left, 1 for tokens.
            generator: On the model's device; None is torch's own.
            use_cache: False recomputes all tokens for each new one.
            on_token: Called with the (B,) int64 tokens of each step.

        Returns:
            (B, T + n), n <= max_new_tokens: `idx`, then the generated tokens.

        Raises:
            InputError: A setting outside its range, or an input that `forward` would refuse.
        """
        from gpt.generate import generate
        from gpt.sampler import Settings

        settings = Settings(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            vocab_size=vocab_size,
            stop_tokens=stop_tokens,
            attention_mask=attention_mask,
            generator=generator,
            use_cache=use_cache,
            on_token=on_token,
        )
        return generate(self, idx, max_new_tokens, settings)

    def clear_cache(self) -> None:
        """Frees the key-value caches and CUDA graphs that `generate` keeps on a GPU for its next calls."""
        clear(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`nn.Module.to`, `half` and the like, which move parameters away from what graphs read."""
        check_conversion(self, fn, self.dtype)
        self.clear_cache()
        return super()._apply(fn, recurse)

    def preflight(self, batch_size: int, seq_len: int, dtype: torch.dtype | None = None) -> kernels.Report:
        """Checks each fused op against its reference at this model's shapes; see `gpt.preflight`."""
        prefer = self.backend().backend if self._use_triton else "auto"
        return preflight(
            self.config,
            self.device,
            batch_size,
            seq_len,
            dtype or self.dtype,
            self.dtype,
            prefer=prefer,
        )

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        format: str = "fused-gpt",
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Writes config, parameters, tokenizer and their hashes into `directory`.

        Args:
            directory: A new or empty folder, or one that an earlier save wrote.
            format: "fused-gpt" for a checkpoint, or "huggingface" for a GPT-2 that `transformers` loads.
            tokenizer: Saved with the model.

        Raises:
            InputError: The format is unknown, the model has an option that GPT-2 in `transformers` lacks, or
                the directory cannot be written. It stays as it was, after each of these errors.
            MachineError: The disk is full, or fails.
            NonFiniteError: A parameter is infinite or NaN.
        """
        from gpt.weights.checkpoint import save_model
        from gpt.weights.huggingface import save_huggingface

        writers = {"fused-gpt": save_model, "huggingface": save_huggingface}
        if format not in writers:
            raise unknown("save_pretrained: format", format, writers)
        writers[format](self, directory, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        config: GPTConfig | Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        use_triton: bool | str = "auto",
    ) -> GPT:
        """Loads a model: see `gpt.weights.pretrained.load_pretrained`."""
        from gpt.weights.pretrained import load_pretrained

        return load_pretrained(
            source, config, device=find_device(device), dtype=dtype, quantize=quantize, use_triton=use_triton
        )
