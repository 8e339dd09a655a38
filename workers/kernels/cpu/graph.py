"""Kernel calls captured once and replayed as one: on the same memory, one fork and join for all of them."""

from __future__ import annotations

from array import array

import torch

from workers.kernels.cpu.arguments import RunGraph
from workers.kernels.cpu.kernel import Kernel, Values, run_graph


class CpuGraph:
    """Notes calls and what they point into, then repeats them in order. Not from two threads at once."""

    def __init__(self) -> None:
        self._calls = array("q")
        self._args: list[array[int]] = []
        self._team = 1
        self._held: list[object] = []
        #: int64 [1]: pairs whose experts are not held, in the last replay.
        self.missing_1 = torch.zeros(1, dtype=torch.int64)

    def add(self, kernel: Kernel[Values], team: int, values: Values) -> None:
        """Note one call."""
        args = kernel.arguments(team, values)
        self._args.append(args)
        self._calls.extend((kernel.address, args.buffer_info()[0], team))
        self._team = max(self._team, team)

    def hold(self, memory: object) -> None:
        """Keep what a call points into as long as the graph."""
        self._held.append(memory)

    def replay(self) -> None:
        run_graph(self._team, RunGraph(len(self._args), self._calls.buffer_info()[0]))
        if self.missing_1[0]:
            self.missing_1[0] = 0
            raise KeyError("an expert was unloaded")
