"""The expert worker's side of captured steps over a group: those of one router.

Legend: that of `step_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from workers.errors import WireError
from workers.kernels.cuda.graphs import capture
from workers.shard import ExpertShard
from workers.transport.collective.mesh import Broken, Mesh
from workers.transport.collective.step_group import StepGroup
from workers.transport.collective.step_rows import Ask, StepWord, places

_MOST_PAIRS = 1 << 20


class StepServer:
    """Computes a router's steps on one shard, in the thread that serves the router."""

    def __init__(self, mesh: Mesh, router: int, shard: ExpertShard) -> None:
        """router: its rank, for whose steps the mesh has a group."""
        self._mesh, self._group, self._shard = mesh, mesh.steps[router], shard
        self._runs: dict[tuple[int, int, int], Callable[[], None]] = {}
        self._status = torch.zeros(1, dtype=torch.int64, device=shard.device)
        # One stream for each router: in one, two workers that have two steps in different orders would wait for ever.
        self._stream: Any = None
        if shard.device.type == "cuda":
            self._stream = torch.cuda.Stream(shard.device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def run(self, word: StepWord, limit_s: float) -> StepWord:
        """One step; what to answer. The first of its size is captured on the way.

        Raises Broken when the router or another worker is gone, WireError for a step that no router asks for.
        """
        if not 0 < word.n_rows * word.top_k <= _MOST_PAIRS or not 0 < word.capacity <= word.n_rows * word.top_k:
            raise WireError(f"a step of impossible sizes: {word}")
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._status.zero_()
            run = self._runs.get(word.size)
            is_new = run is None
            if run is None:
                run = _Layers(self._group, self._shard, self._status, word).run
            try:
                run()
            except RuntimeError as error:
                raise Broken(self._mesh.broken or str(error)) from None
            self._mesh.wait_for_stream(limit_s)
            is_void = bool(int(self._status))
            if is_new:
                self._runs[word.size] = capture(run)[0].replay if self._shard.only_launches else run
        return word._replace(is_void=is_void)


class _Layers:
    """All layers of a step of one size: rows in, rows out. `run` only launches where the shard does."""

    def __init__(self, group: StepGroup, shard: ExpertShard, status: Tensor, word: StepWord) -> None:
        n_rows, top_k, capacity = word.size
        self._group, self._shard, self._status = group, shard, status
        self._ask = Ask(n_rows, top_k, shard.hidden_size, shard.dtype, shard.device)
        self._capacity = capacity
        # One more than travels: what has no place goes there.
        self._back_RD = torch.zeros(capacity + 1, shard.hidden_size, dtype=shard.dtype, device=shard.device)

    def run(self) -> None:
        """Every layer that has experts, in order."""
        me, ask = self._group.rank - 1, self._ask
        for layer in self._shard.layers:
            self._group.to_workers(ask.block)
            is_mine_P = (ask.word_P >= 0) & (ask.word_P >> 16 == me)
            ids_P = torch.where(is_mine_P, ask.word_P & 0xFFFF, -1)
            y_ND, row_P = self._shard.fixed(layer, ask.x_TD, ids_P.view(len(ask.x_TD), -1))
            is_here_P = row_P >= 0
            self._status += (is_mine_P & ~is_here_P).any()
            place_P = places(is_mine_P.long()[:, None])
            place_P = torch.where(is_here_P & (place_P < self._capacity), place_P, self._capacity)
            if len(y_ND):
                self._back_RD.index_copy_(0, place_P, y_ND.index_select(0, row_P.clamp_min(0)))
            self._group.to_router(self._back_RD[:-1])
