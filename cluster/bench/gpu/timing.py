"""Time on a GPU: by its own events, over replays of a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def event_us(work: Callable[[], object]) -> float:
    """Microseconds on the device from before to after what `work` launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def median_us(work: Callable[[], object], repeats: int = 5) -> float:
    """Median of `event_us` after two rounds of warming up."""
    work()
    work()
    return statistics.median(event_us(work) for _ in range(repeats))


def graph_us(launch: Callable[[int], object], n: int, repeats: int = 5) -> float:
    """Median microseconds of one `launch(i)`, of `n` of them captured as one graph."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            launch(i)
    return median_us(graph.replay, repeats) / n
