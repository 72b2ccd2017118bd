"""A step of training or of evaluation as a CUDA graph: the host launches all its kernels at once.

A step of few tokens takes the GPU less time than the host needs to launch its kernels one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt.cuda_graph import captured
from gpt.data.dataset import Batch
from gpt.errors import first_line

TOKENS = 1 << 14  # of the largest step that is captured; the GPU takes longer than the host for larger ones


class StepGraph:
    """Runs a step on batches, as a CUDA graph from the second step in a row with the same shapes on.

    A step with other shapes runs eagerly, and the graph stays for those that follow it. The graph reads the
    batches from tensors of its own, and everything else (parameters, optimizer state, learning rate, random
    state) where an eager step does, so changes in place are seen.

    Args:
        run: The step. It must not synchronise, and its memory and the order of its launches must depend on
            the batches' shapes alone.
        device: A CUDA GPU.
        name: What the steps are, for the warning of a failed capture: "training steps".
    """

    def __init__(self, run: Callable[[Sequence[Batch]], Tensor], device: torch.device, name: str) -> None:
        self._run, self._device, self._name = run, device, name
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: object = None  # of the captured step: settings and shapes
        self._warm: object = None  # of the last step, if it was eager
        self._fails = False

    def __call__(self, batches: Sequence[Batch], settings: object) -> Tensor:
        """The result of `run`, which the next call overwrites.

        Args:
            batches: On the device.
            settings: What else decides which kernels `run` launches. A graph is replayed for equal ones.
        """
        key = settings, [[None if t is None else t.shape for t in batch] for batch in batches]
        if key != self._key and key == self._warm and not self._fails:
            self._capture(batches, key)
        if self._graph is None or key != self._key:
            self._warm = key  # this step compiles kernels and creates the optimizers' state
            with self._on_stream():
                return self._run(batches)

        for kept, batch in zip(self._batches, batches, strict=True):
            for static, tensor in zip(kept, batch, strict=True):
                if static is not None and tensor is not None:
                    static.copy_(tensor)
        self._graph.replay()
        self._warm = None
        return self._result

    def reset(self) -> None:
        """Frees the graph, because tensors that it uses have been replaced."""
        self._graph = self._key = self._warm = None

    def _capture(self, batches: Sequence[Batch], key: object) -> None:
        """Captures a step, without running it. If that fails, warns and leaves all later steps eager."""
        self.reset()
        graph = torch.cuda.CUDAGraph()
        self._batches = [
            Batch(b.inputs.clone(), b.targets.clone(), None if b[2] is None else b[2].clone())
            for b in batches
        ]
        try:
            with captured(graph, self._stream):
                self._result = self._run(self._batches)
        except RuntimeError as error:
            self._fails = True
            warnings.warn(f"{self._name} run without a CUDA graph: {first_line(error)}", stacklevel=2)
        else:
            self._graph, self._key = graph, key

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Runs the block on the stream of the capture, where autograd then expects the parameters."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
