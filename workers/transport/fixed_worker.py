"""The expert worker's side of fixed capacity: every expert it holds over every slot, chosen by mask.

A decode step brings few rows, so that reading the weights is the cost, and most experts are chosen by some row anyway.

Legend: S slots (those of all routers), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.kernels.reference import swiglu
from workers.shard import ExpertShard
from workers.transport.fixed_group import FixedGroup, Slots, Word


class FixedWorker:
    """Serves the steps of a `FixedGroup` with one shard, whose slots must not change meanwhile."""

    def __init__(self, group: FixedGroup, shard: ExpertShard, capacity: int) -> None:
        """capacity: C, as the routers say it."""
        self._group = group
        self._shard = shard
        n_slots = group.n_routers * capacity
        self._in = Slots(n_slots, shard.hidden_size, shard.dtype, shard.device)
        self._back_SD = torch.zeros(n_slots, shard.hidden_size, dtype=shard.dtype, device=shard.device)

    def serve(self) -> None:
        """Every step until a router says stop."""
        while self._group.step_header(Word.GO) is Word.GO:
            self.layers()

    def layers(self) -> None:
        """All layers of one step, in order: what can be captured."""
        for layer in range(self._shard.n_layers):
            self._group.to_workers(self._in.block).wait()
            self._back_SD.copy_(masked_swiglu(self._in.x_SD, self._in.expert_S, self._shard.weights(layer)))
            self._group.to_routers(self._back_SD).wait()


def masked_swiglu(x_SD: Tensor, expert_S: Tensor, experts: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """`y[s] = expert(expert_S[s])(x[s])`, zeros where that is none of `experts`. No size depends on `expert_S`."""
    y_SD = torch.zeros_like(x_SD, memory_format=torch.contiguous_format)
    x_SD = x_SD.contiguous()
    for expert, (w13_2FD, w2_DF) in experts.items():
        is_its = expert_S[:, None] == expert
        y_SD = torch.where(is_its, swiglu(x_SD, w13_2FD.to(x_SD.dtype), w2_DF.to(x_SD.dtype)), y_SD)
    return y_SD
