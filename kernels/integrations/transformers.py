"""The kernels in Hugging Face `transformers`: attention for any decoder; norms, FFN and loss for GPT-2.

Importing this module registers "fused_gpt" as an attention implementation::

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fused_gpt")

`fuse` puts the other ops into an existing GPT-2 model, and `unfuse` removes them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple

import kernels
import kernels.nn

NAME = "fused_gpt"

_UNSUPPORTED = ("softcap", "s_aux")  # neither the kernel nor the sdpa fallback implements these arguments
_APPROXIMATE: dict[type, str] = {NewGELUActivation: "tanh", GELUTanh: "tanh", GELUActivation: "none"}
_warned: set[str] = set()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`kernels.causal_attention` with the signature of a transformers attention function.

    A call that the kernel cannot express (a layer that is not causal, or a mask with gaps) runs transformers'
    sdpa attention instead. Each reason gives one FallbackWarning.

    Args:
        module: The model's attention layer.
        query, key, value: (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D).
        attention_mask: None, a mask that the function `attention_mask` below returned, or the user's own 4-D
            mask.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the logits; None means 1 / sqrt(D).
        is_causal: Overrides the layer's own `is_causal`.
        **kwargs: The other arguments that the model passes.

    Returns:
        The output (B, Tq, H, D), and None in place of the attention weights.

    Raises:
        ValueError: The model uses a soft cap or attention sinks.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME} attention: the model sets {name}, expected attn_implementation='eager' for it"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    obstacle = _obstacle(query, key, value, attention_mask, causal, kwargs)
    if obstacle is not None:
        _warn_once(obstacle)
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    key_start = None if attention_mask is None else attention_mask[:, 0, :, 0]  # (B, 1) or (B, Tq)
    if key_start is not None and key_start.shape[1] != query.shape[2]:
        key_start = key_start[:, 0]
    out = kernels.causal_attention(query, key, value, key_start=key_start, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass: the first key that each query attends to, where that describes the mask.

    Args:
        batch_size, q_length, kv_length: B, Tq, Tk.
        q_offset, kv_offset: Positions of the first query and of the first key.
        mask_function: transformers' description of the mask's pattern.
        attention_mask: bool (B, positions), False for padding.
        device: Device of the mask.
        **kwargs: Passed to transformers' `sdpa_mask`.

    Returns:
        None where transformers' `sdpa_mask` returns None. int32 (B, 1, 1 or Tq, 1): a causal mask whose rows
        start at these keys. bool (B, 1, Tq, Tk): any other mask, and every mask under torch.compile.
    """
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        device=device,
        **kwargs,
    )
    if mask is None or torch.compiler.is_compiling():
        return mask
    start = _key_start(mask)
    return mask if start is None else start


def _key_start(mask: Tensor) -> Tensor | None:
    """The first key of each row of a bool mask (B, 1, Tq, Tk), as int32 (B, 1, 1 or Tq, 1).

    None if a row is not causal from its first key on.
    """
    Tq, Tk = mask.shape[-2:]
    keys = torch.arange(Tk, device=mask.device)
    position = torch.arange(Tk - Tq, Tk, device=mask.device)[:, None]
    start = torch.where(mask.any(-1), mask.to(torch.uint8).argmax(-1), Tk)[..., None]  # (B, 1, Tq, 1)
    if not torch.equal(mask, (keys >= start) & (keys <= position)):
        return None
    shared = start[:, :, -1:]
    if torch.equal(mask, (keys >= shared) & (keys <= position)):
        start = shared
    return start.to(torch.int32)


def _obstacle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why a call is not causal attention from a first key on; None if it is."""
    if not causal:
        return "the layer is not causal"
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            return f"the model passes {name}"
    if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
        return "keys and values differ in shape, or queries and keys in head dimension"
    if mask is None:
        return None if query.shape[2] in (1, key.shape[2]) else "the positions of the queries are unknown"
    if mask.dtype != torch.int32:
        return "the mask is not causal from a first key on"
    return None


def _warn_once(obstacle: str) -> None:
    if obstacle not in _warned and not torch.compiler.is_compiling():
        _warned.add(obstacle)
        warnings.warn(
            f"{NAME} attention: {obstacle}; sdpa runs instead", kernels.FallbackWarning, stacklevel=3
        )


class GPT2MLP(modeling_gpt2.GPT2MLP):
    """dropout(gelu(x c_fc + b) c_proj + b) with `kernels.gelu_ffn`; Conv1D stores transposed weights.

    Where a submodule is not plain, as with adapters, transformers' own forward pass runs.
    """

    fuses: ClassVar = {"c_fc": (Conv1D,), "c_proj": (Conv1D,), "act": tuple(_APPROXIMATE)}

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, down = self.c_fc, self.c_proj
        plain = kernels.is_plain(up, Conv1D) and kernels.is_plain(down, Conv1D)
        if not plain or not kernels.is_plain(self.act, *_APPROXIMATE):
            return super().forward(hidden_states)
        approximate = _APPROXIMATE[type(self.act)]
        return self.dropout(
            kernels.gelu_ffn(
                hidden_states, up.weight.T, up.bias, down.weight.T, down.bias, approximate=approximate
            )
        )


class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel):
    """Computes the training loss with `kernels.linear_cross_entropy`; the output then has no logits.

    Where `lm_head` is not plain, as with adapters, transformers' own loss runs.
    """

    fuses: ClassVar = {"lm_head": (nn.Linear,)}

    @can_return_tuple  # type: ignore[untyped-decorator]
    @functools.wraps(modeling_gpt2.GPT2LMHeadModel.forward)
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        standard = self.loss_function is ForCausalLMLoss and kernels.is_plain(self.lm_head, nn.Linear)
        if labels is None or not standard or not self.training:
            return super().forward(*args, labels=labels, **kwargs)
        outputs = self.transformer(*args, **kwargs)
        loss = _causal_loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=loss, **rest)


def _causal_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss of transformers' `ForCausalLMLoss`, computed from the hidden states (B, T, C)."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = kernels.linear_cross_entropy(
        hidden,
        head.weight,
        shift_labels.to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


_NORM: dict[type, type] = {nn.LayerNorm: kernels.nn.LayerNorm}
_FFN: dict[type, type] = {modeling_gpt2.GPT2MLP: GPT2MLP}
_LOSS: dict[type, type] = {modeling_gpt2.GPT2LMHeadModel: GPT2LMHeadModel}


def fuse(model: PreTrainedModel, *, norm: bool = True, ffn: bool = True, loss: bool = True) -> int:
    """Puts `layer_norm`, `gelu_ffn` and `linear_cross_entropy` into a transformers GPT-2 model.

    Parameters, their names and the saved files do not change.

    Args:
        model: A GPT-2 model of transformers, with or without a head.
        norm, ffn, loss: Which ops to use. A feed-forward whose activation is not GELU stays unchanged.

    Returns:
        The number of changed modules; `unfuse` changes them back.

    Raises:
        TypeError: The model is not a GPT-2.
    """
    if not isinstance(model, modeling_gpt2.GPT2PreTrainedModel):
        raise TypeError(f"fuse: model is {type(model).__name__}, expected a GPT-2 of transformers")
    return _change(model, (_NORM if norm else {}) | (_FFN if ffn else {}) | (_LOSS if loss else {}))


def unfuse(model: PreTrainedModel) -> int:
    """Undoes `fuse`, and returns the number of changed modules."""
    return _change(model, {fused: plain for plain, fused in (_NORM | _FFN | _LOSS).items()})


def _change(model: nn.Module, classes: dict[type, type]) -> int:
    """Replaces each module's class by its value in `classes`; the two classes differ only in `forward`."""
    changed = 0
    for module in model.modules():
        if isinstance(module, modeling_gpt2.GPT2MLP) and type(module.act) not in _APPROXIMATE:
            continue
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            changed += 1
    return changed


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
