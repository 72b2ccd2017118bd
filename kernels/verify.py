"""Runs an op and compares every output and gradient with its reference, by the rule of `kernels.tolerance`.

Tests, benches, the tuner and preflight use these functions to check kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch

from kernels import dispatch
from kernels.spec import Case, OpSpec
from kernels.tolerance import Verdict, compare


def run_case(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    gradients: tuple[str, ...],
    writes: tuple[str, ...] = (),
    seed: int = 1,
) -> dict[str, torch.Tensor | None]:
    """Outputs and gradients of one call: ``{"out": …, "dq": …}``; several outputs are ``out0``, ``out1``, ….

    An input that the call writes is an output too, as ``out_k_cache``. The call gets a copy of it, so that
    calls can be repeated with the same inputs.

    The gradients are those of ``sum(output * weights)``, where the weights are standard normal values, drawn
    with `seed` on the outputs' device. A scalar output is a mean over rows. Its weight is multiplied by the
    number of rows: otherwise the gradients of a call with many rows would be smaller than the rounding floor.

    Args:
        function: The op or its reference.
        inputs: The keyword arguments of the call.
        gradients: The inputs to differentiate with respect to; inputs that are None are skipped.
        writes: The inputs that the function writes.
        seed: Seed of the weights.
    """
    leaves = {
        name: value.detach().requires_grad_(name in gradients) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    written = {name: leaves[name].clone() for name in writes}
    result = function(**leaves | written)
    outputs = result if isinstance(result, tuple) else (result,)
    results: dict[str, torch.Tensor | None] = {
        "out" if len(outputs) == 1 else f"out{i}": output.detach() for i, output in enumerate(outputs)
    } | {f"out_{name}": value for name, value in written.items()}

    wanted = [name for name in gradients if leaves.get(name) is not None]
    if wanted:
        device = outputs[0].device
        generator = torch.Generator(device).manual_seed(seed)
        first = next(iter(leaves.values()))
        rows = first.numel() // max(1, first.shape[-1])
        drawn = [
            torch.randn(output.shape, device=device, generator=generator).mul_(1 if output.ndim else rows)
            for output in outputs
        ]
        weights = [weight.to(output.dtype) for weight, output in zip(drawn, outputs, strict=True)]
        values = torch.autograd.grad(outputs, [leaves[name] for name in wanted], weights, allow_unused=True)
        results |= {f"d{name}": value for name, value in zip(wanted, values, strict=True)}
    return results


class Oracle:
    """The expected results of one call: the reference in the call's dtype, and in a wider dtype.

    Args:
        spec: The op.
        inputs: The call's keyword arguments.
        dtype: The dtype that the op computes in.
        gradients: The inputs whose gradients are compared; None means those of the spec.
        oracle_dtype: The wider dtype.
    """

    def __init__(
        self,
        spec: OpSpec,
        inputs: dict[str, Any],
        dtype: torch.dtype,
        gradients: tuple[str, ...] | None = None,
        oracle_dtype: torch.dtype = torch.float64,
    ) -> None:
        wanted = spec.gradients if gradients is None else gradients
        self.dtype = dtype
        self.terms = 1 if spec.terms is None else spec.terms(inputs)
        self.same_dtype = run_case(spec.reference, inputs, wanted, spec.writes)
        wide_inputs = {n: v.to(oracle_dtype) if _is_float(v) else v for n, v in inputs.items()}
        self.wide = run_case(spec.reference, wide_inputs, wanted, spec.writes)
        tensors = [v for v in (*inputs.values(), *self.wide.values()) if _is_float(v)]
        self.scale = max((t.detach().abs().max().item() for t in tensors if t.numel()), default=1.0)

    def judge(self, results: Mapping[str, torch.Tensor | None]) -> list[Verdict]:
        """One verdict for each output and gradient in `results`, a dict as `run_case` returns it."""
        return [
            compare(
                name,
                results.get(name),
                self.same_dtype[name],
                wide,
                dtype=self.dtype,
                scale=self.scale,
                terms=1 if name.startswith("out") else self.terms,
            )
            for name, wide in self.wide.items()
        ]


def _is_float(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backend: str = "triton",
    seed: int = 0,
    oracle_dtype: torch.dtype = torch.float64,
) -> list[Verdict]:
    """Runs one case of one op on `backend` and judges each output and gradient.

    Args:
        spec: The op.
        case: The call.
        dtype: The dtype that the op computes in.
        device: Where to run.
        backend: "triton" or "reference".
        seed: Seed of the inputs.
        oracle_dtype: The wider dtype that the reference is evaluated in.
    """
    inputs = spec.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(seed))
    with dispatch.use_backend(**{spec.name: backend}):
        results = run_case(spec.function, inputs, spec.gradients, spec.writes)
    return Oracle(spec, inputs, dtype, oracle_dtype=oracle_dtype).judge(results)
