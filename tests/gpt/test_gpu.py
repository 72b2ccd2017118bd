"""The whole model on a GPU: training on either side, captured decoding, synchronisations, and preflight's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import gpt.decode
from gpt import GPT
from gpt.preflight import preflight

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
VOCABULARY = 50304


def batches(steps: int, batch: int = 8, length: int = 512) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A Markov chain that a model can learn: each token is one of four that its predecessor decides."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (batch, 1), generator=generator)
        choices = torch.randint(4, (batch, length), generator=generator)
        for t in range(length):
            ids = torch.cat([ids, (ids[:, -1:] * 31 + choices[:, t : t + 1] * 7 + 3) % 509], 1)
        ids = ids.to(DEVICE)
        yield ids[:, :-1], ids[:, 1:]


def curve(use_triton: bool, seed: int, steps: int = 200) -> list[float]:
    torch.manual_seed(seed)
    model = GPT("gpt2", vocab_size=VOCABULARY, use_triton=use_triton, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    losses = []
    for idx, targets in batches(steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def gap(a: list[float], b: list[float], window: int = 20) -> float:
    """The largest difference between two curves averaged over `window` steps."""
    smooth = [torch.tensor(x).unfold(0, window, window).mean(1) for x in (a, b)]
    return (smooth[0] - smooth[1]).abs().max().item()


def test_training_stays_within_the_noise_of_seeds() -> None:
    """A kernel whose error biases training, at a real size in bfloat16."""
    reference, other = curve(False, 0), curve(False, 1)
    triton = curve(True, 0)
    assert reference[-1] < 0.6 * reference[0]
    assert gap(triton, reference) <= gap(other, reference)


@contextmanager
def never_captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = gpt.decode.Decoder.__init__

    def initialise(self: gpt.decode.Decoder, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self._capturable = False

    with monkeypatch.context() as patch:
        patch.setattr(gpt.decode.Decoder, "__init__", initialise)
        yield


@pytest.mark.parametrize("use_triton", [True, False])
def test_captured_decoding_equals_eager(use_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that replays a stale length, position or token, or that reads padding."""
    torch.manual_seed(0)
    model = GPT("gpt2", use_triton=use_triton, device=DEVICE, n_layer=3, block_size=128)
    idx = torch.randint(50257, (3, 20), device=DEVICE)
    mask = torch.ones_like(idx)
    mask[1, :7] = 0
    captured = model.generate(idx, 100, do_sample=False, attention_mask=mask)
    with never_captured(monkeypatch):
        eager = model.generate(idx, 100, do_sample=False, attention_mask=mask)
    assert torch.equal(captured, eager)
    assert captured[:, 20:].unique().numel() > 20


@pytest.mark.parametrize("stop_tokens", [None, [50256]])
def test_decoding_waits_for_nothing(stop_tokens: list[int] | None) -> None:
    """A token that costs a synchronisation although nobody looks at it."""
    model = GPT("gpt2", use_triton=True, device=DEVICE, n_layer=2)
    idx = torch.randint(50257, (2, 16), device=DEVICE)
    settings = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "stop_tokens": stop_tokens}
    model.generate(idx, 4, **settings)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") if stop_tokens else _no_warning() as caught:
            model.generate(idx, 40, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if stop_tokens:
        assert len(caught) <= 2  # the ids' way to the GPU and the length's way back, not one a token


@contextmanager
def _no_warning() -> Iterator[list[object]]:
    yield []


def test_preflight_is_quick() -> None:
    """A preflight that delays the first step by more than fifteen seconds, or that fails on this GPU."""
    model = GPT("gpt2", device=DEVICE)
    report = preflight(model.config, DEVICE, 8, 1024, torch.bfloat16, torch.float32, use_cache=False)
    assert report.ok, str(report)
    assert report.seconds < 15
