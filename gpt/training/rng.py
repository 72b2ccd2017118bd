"""The state of torch's random numbers, from which dropout draws, as text that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

State = Mapping[str, str | None]


def get_state(device: torch.device) -> State:
    """The state on the CPU, and on `device` if that is a GPU."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": _to_hex(torch.get_rng_state()), "cuda": None if cuda is None else _to_hex(cuda)}


def set_state(state: State, device: torch.device) -> None:
    """Goes on from what `get_state` returned."""
    cpu, cuda = state["cpu"], state["cuda"]
    if cpu is not None:
        torch.set_rng_state(_from_hex(cpu))
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(cuda), device)


def seed(*numbers: int) -> None:
    """Begins anew, everywhere, with numbers that are a function of `numbers`."""
    import numpy as np

    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
