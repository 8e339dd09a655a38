"""The expert worker's side of a step through device memory: each layer's rows taken, computed and given, of all routers
that take part, so that the weights are read once.

Legend: M routers, T token rows of each, K experts a token, P = M * T * K pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.transport.device.launch import STRIDE, Launch, Taken, Turn
from workers.transport.device.rows import StepRows

_NO_PART = -(1 << 62)


class Shard(Protocol):
    """What the worker computes with; of `workers.shard.ExpertShard`."""

    n_layers: int
    layers: tuple[int, ...]  # those with experts
    n_experts: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def fixed(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]: ...


class Report(NamedTuple):
    """Of a step."""

    is_void: bool
    n_pairs: int
    waited_ns: int  # for routers


class StepWorker:
    """All layers of a step for the routers whose memory this worker has mapped. `run` only launches."""

    def __init__(self, shard: Shard, launch: Launch, n_routers: int, n_rows: int, top_k: int) -> None:
        """n_rows: T, the most rows of a router in a step."""
        device = shard.device
        self._report = torch.zeros(3, dtype=torch.int64, device=device)
        self._status = self._report[:1]
        self._counts = Taken(self._report[1:2], self._report[2:])
        self._shard, self._launch, self._top_k = shard, launch, top_k
        self._step_M = torch.full((n_routers,), _NO_PART, dtype=torch.int64, device=device)
        self._x = torch.zeros(n_routers * n_rows, shard.hidden_size, dtype=shard.dtype, device=device)
        self._ids = torch.full((n_routers * n_rows, top_k), -1, dtype=torch.int32, device=device)

    @property
    def on_gpu(self) -> bool:
        """Whether launches can be captured."""
        return self._report.is_cuda

    def begin_step(self, step: int, taking_part: Sequence[int]) -> None:
        """Number the step that follows, and name the routers that have rows in it."""
        self._report.zero_()
        steps = torch.full((len(self._step_M),), _NO_PART, dtype=torch.int64)
        steps[list(taking_part)] = step * STRIDE
        self._step_M.copy_(steps, non_blocking=False)

    def run(self, routers: Mapping[int, tuple[StepRows, int]], n_rows: int) -> None:
        """Every layer, with up to `n_rows` rows of each router.

        routers: by their number here, the memory of each and the number that it gave this worker.
        """
        numbers = sorted(routers)
        x_TD = self._x[: len(numbers) * n_rows]
        ids_TK = self._ids[: len(numbers) * n_rows]
        for layer in self._shard.layers:
            for at, number in enumerate(numbers):
                rows, me = routers[number]
                part = slice(at * n_rows, (at + 1) * n_rows)
                self._launch.take(rows, self._turn(number, layer), me, x_TD[part], ids_TK[part], self._counts)
            y_PD, place_P = self._shard.fixed(layer, x_TD, ids_TK)
            for at, number in enumerate(numbers):
                rows, me = routers[number]
                part = slice(at * n_rows, (at + 1) * n_rows)
                pairs = slice(at * n_rows * self._top_k, (at + 1) * n_rows * self._top_k)
                ids_P = ids_TK[part].flatten()
                self._launch.give(rows, self._turn(number, layer), me, y_PD, place_P[pairs], ids_P)

    def read(self) -> Report:
        """What the step was; waits for its end."""
        status, n_pairs, waited_ns = self._report.tolist()
        return Report(bool(status), n_pairs, waited_ns)

    def _turn(self, router: int, layer: int) -> Turn:
        return Turn(self._step_M[router : router + 1], self._status, layer + 1)
