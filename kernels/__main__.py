"""`python -m kernels`: the backend that each op takes on this machine, and why."""

from __future__ import annotations

import torch

from kernels import __version__, explain
from kernels.dispatch import triton_version
from kernels.registry import SPECS


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    triton = "not installed" if triton_version is None else ".".join(map(str, triton_version))
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    print(f"fused-gpt {__version__}, torch {torch.__version__}, triton {triton}, {name}")

    for op, spec in SPECS.items():
        generator = torch.Generator(device).manual_seed(0)
        inputs = spec.make_inputs(spec.tagged("small")[0], dtype, device, generator)
        try:
            choice = explain(op, **inputs)
            print(f"  {op:<22}{choice.backend:<11}{choice.reason}")
        except RuntimeError as error:  # FUSED_GPT_BACKEND=triton where it cannot run
            print(f"  {op:<22}{'none':<11}{error}")


if __name__ == "__main__":
    main()
