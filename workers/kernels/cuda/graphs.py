"""CUDA graphs: whatever is launched, noted instead of run, and run as often as wanted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(launch: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `launch` launches, which has run before, so that all of it is compiled; and what it returned,
    the memory that every replay writes to. pool: of the graphs that share memory."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # what it frees meanwhile (an older graph, pinned memory) would make the capture invalid
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = launch()
    finally:
        gc.enable()
    return graph, result
