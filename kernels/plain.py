"""Whether a fused op may read a submodule's parameters instead of calling the submodule.

A fused op computes what several modules would: `gelu_ffn` replaces two linear layers and a GELU. It reads
their parameters and never calls them, which skips adapters, hooks, parametrizations and pruning. `is_plain`
is the rule: where a submodule is not plain, the module steps aside, and calls its submodules one by one.

A class lists in `fuses` the submodules whose parameters it reads, and the plain types of each;
`kernels.explain` reads these lists.
"""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether `module` is exactly one of `kinds`, and calling it runs nothing but the `forward` of its class.

    Adapters and quantized layers are other types. A parametrization makes the module a subclass. Pruning and
    the older `weight_norm` add hooks.
    """
    return type(module) in kinds and not _is_hooked(module)


def has_hooks(model: nn.Module) -> bool:
    """Whether calling a module of `model` runs hooks, or a `forward` that was set on the instance.

    The replay of a CUDA graph does not run them.
    """
    return any(map(_is_hooked, model.modules()))


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def called_submodules(model: nn.Module) -> dict[str, str]:
    """The submodules of `model` for which a fused op steps aside, by name, with the reason."""
    reasons: dict[str, str] = {}
    for prefix, owner in model.named_modules():
        for name, kinds in getattr(type(owner), "fuses", {}).items():
            module = getattr(owner, name)
            if module is not None and not is_plain(module, *kinds):
                reasons[f"{prefix}.{name}" if prefix else name] = _reason(module, kinds)
    return reasons


def _reason(module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why `module` is not plain."""
    if type(module) not in kinds:
        return f"is a {_name(type(module))}, expected {' or '.join(map(_name, kinds))} itself"
    return "has hooks" if "forward" not in module.__dict__ else "has a forward of its own"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
