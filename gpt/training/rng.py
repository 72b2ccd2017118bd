"""The state of torch's random number generators, which dropout uses, as strings for JSON."""

from __future__ import annotations

from collections.abc import Mapping

import torch

State = Mapping[str, str | None]


def get_state(device: torch.device) -> State:
    """The state of the CPU's generator, and of the generator of `device` if it is a GPU."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": _to_hex(torch.get_rng_state()), "cuda": None if cuda is None else _to_hex(cuda)}


def set_state(state: State, device: torch.device) -> None:
    """Restores what `get_state` returned."""
    cpu, cuda = state["cpu"], state["cuda"]
    if cpu is not None:
        torch.set_rng_state(from_hex(cpu))
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(from_hex(cuda), device)


def seed(*numbers: int) -> None:
    """Seeds all of torch's generators with a hash of `numbers`."""
    import numpy as np

    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def from_hex(text: str) -> torch.Tensor:
    """The state of a generator; ValueError or TypeError if `text` is not a string of hexadecimal digits."""
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
