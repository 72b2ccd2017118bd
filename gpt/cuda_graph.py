"""The capture of a CUDA graph, of a training step or of a decoding step."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_capturing = threading.Lock()  # a process captures one graph at a time


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Captures into `graph` what the block launches on `stream`. Other threads may use the GPU meanwhile.

    Python's garbage collector runs before the capture and not during it: it could free another graph that a
    reference cycle keeps alive, which CUDA does not permit during a capture.
    """
    with _capturing:
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with (
                torch.cuda.device(stream.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                yield
        finally:
            if enabled:
                gc.enable()
