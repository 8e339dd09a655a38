"""Fixed capacity: the decode step that can be captured as a CUDA graph.

A process group steps through the layers in lockstep, with blocks of a fixed size between routers and workers. Nothing
in a step depends on what the gate chose: counts stay on the device, and the host decides nothing between the step's
header and its last layer. Over gloo it runs the same way. A worker computes every expert it holds over every slot and
chooses by mask: a decode step brings few rows, so that reading the weights is the cost, and most experts are chosen by
some row anyway.

Legend: T token rows, K experts a token, P = T * K pairs, N workers, M routers, C rows of capacity for each router at
each worker, S slots, D hidden size, E experts, B bytes of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.kernels.ops import Ops
from workers.kernels.torch.ops import TorchOps
from workers.kernels.weights import Matrix
from workers.shard import ExpertShard
from workers.transport.collective.group import Group
from workers.transport.collective.mesh import c10d, connect_store, gloo_interface

_BUILD_S = 60.0


class Word(IntEnum):
    """What a router wants of the next step."""

    GO = 0
    STOP = 1


class FixedGroup:
    """One rank of the group. All ranks call the same operations in the same order."""

    def __init__(self, group: Group, rank: int, host: str, device: torch.device | str = "cpu") -> None:
        """Blocks until every rank is there: over NCCL where `device` is a CUDA device, else over gloo bound to `host`.

        Raises RuntimeError when a rank does not come.
        """
        self.group = group
        self.rank = rank
        self.device = torch.device(device)
        self.n_routers, self.n_workers = len(group.routers), len(group.workers)
        store = c10d.PrefixStore(f"fixed-{group.number}", connect_store(group.store, _BUILD_S))
        self._ranks: Any
        if self.device.type == "cuda":
            self._ranks = c10d.ProcessGroupNCCL(store, rank, len(group.members), timedelta(seconds=_BUILD_S))
        else:
            options = c10d.ProcessGroupGloo._Options()
            options._devices, options._threads = [gloo_interface(host)], 1
            options._timeout = timedelta(seconds=_BUILD_S)
            self._ranks = c10d.ProcessGroupGloo(store, rank, len(group.members), options)

    def step_header(self, word: Word) -> Word:
        """What the routers want of the next step: STOP if any does. The only time that a step visits the host."""
        said = torch.full((len(self.group.members),), int(word), dtype=torch.int64, device=self.device)
        heard = torch.empty_like(said)
        self._ranks.alltoall_base(heard, said, [], []).wait()
        return Word(int(heard[: self.n_routers].max()))

    def to_workers(self, slots: Tensor) -> Any:
        """Of a router: slots [N * C, ...] go out, C to each worker. Of a worker: slots [M * C, ...] come in."""
        nothing = slots[:0]
        if self._is_router:
            return self._ranks.alltoall_base(nothing, slots, self._none, self._to_workers(slots))
        return self._ranks.alltoall_base(slots, nothing, self._to_routers(slots), self._none)

    def to_routers(self, slots: Tensor) -> Any:
        """The way back: of a worker slots [M * C, ...] go out, of a router slots [N * C, ...] come in."""
        nothing = slots[:0]
        if self._is_router:
            return self._ranks.alltoall_base(slots, nothing, self._to_workers(slots), self._none)
        return self._ranks.alltoall_base(nothing, slots, self._none, self._to_routers(slots))

    @property
    def _is_router(self) -> bool:
        return self.rank < self.n_routers

    @property
    def _none(self) -> list[int]:
        return [0] * len(self.group.members)

    def _to_workers(self, slots: Tensor) -> list[int]:
        return [0] * self.n_routers + [len(slots) // self.n_workers] * self.n_workers

    def _to_routers(self, slots: Tensor) -> list[int]:
        return [len(slots) // self.n_routers] * self.n_routers + [0] * self.n_workers


class Slots:
    """Room for rows on their way to the workers: each with the expert that is to compute it, or EMPTY."""

    EMPTY = -1

    def __init__(self, n_slots: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        row_bytes = hidden_size * dtype.itemsize
        #: uint8 [n_slots, B]: a row, then its expert.
        self.block = torch.zeros(n_slots, row_bytes + 4, dtype=torch.uint8, device=device)
        self.x_SD = self.block[:, :row_bytes].view(dtype)
        self.expert_S = self.block[:, row_bytes:].view(torch.int32)[:, 0]


class Sent(NamedTuple):
    """A dispatch in flight."""

    dtype: torch.dtype
    place_TK: Tensor  # the slot of each token's experts, in expert order
    weights_TK: Tensor  # in expert order


class FixedExperts:
    """`Experts` over a `FixedGroup`. Every router of the group runs every step: layer 0 first, none left out.

    `owner_LE`, int64 on the group's device, says which worker holds each expert. It may be written to between steps: a
    captured step follows.
    """

    only_launches = True

    def __init__(
        self, group: FixedGroup, owner_LE: Tensor, hidden_size: int, dtype: torch.dtype, capacity: int
    ) -> None:
        """capacity: C. As many as the pairs of a step are always enough."""
        self.owner_LE = owner_LE
        #: int64, on the device: pairs that found no slot since it was last set to 0. Their step is to be thrown away.
        self.overflow = torch.zeros((), dtype=torch.int64, device=group.device)
        self._group = group
        self._capacity = capacity
        n_slots = group.n_workers * capacity
        # One more than travels: whatever finds no slot goes there, and comes back from there as zeros.
        self._out = Slots(n_slots + 1, hidden_size, dtype, group.device)
        self._back_SD = torch.zeros(n_slots + 1, hidden_size, dtype=dtype, device=group.device)
        self._worker_N = torch.arange(group.n_workers, device=group.device)

    def begin_step(self, step: int) -> None:
        """Tell the workers that a step follows. Outside of what is captured."""
        self._group.step_header(Word.GO)

    def stop(self) -> None:
        """Instead of a step: end it for all ranks."""
        self._group.step_header(Word.STOP)

    def idle_step(self, step: int) -> None:
        """Take part in a step of other routers, without rows."""
        self.begin_step(step)
        x_TD = self._back_SD[:0]
        ids_TK = torch.zeros(0, 1, dtype=torch.int64, device=x_TD.device)
        for layer in range(len(self.owner_LE)):
            self.combine(self.dispatch(layer, x_TD, ids_TK, ids_TK.float()))

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Sent:
        """Send the rows; see `workers.model.experts.Experts`. Shapes may differ from step to step, not in a graph."""
        n_slots = len(self._back_SD) - 1
        ids_TK, order_TK = torch.sort(expert_ids_TK, dim=1)
        worker_P = self.owner_LE[layer].index_select(0, ids_TK.flatten())
        # The slot of a pair at its worker: how many pairs before it go there too.
        is_at_PN = worker_P[:, None] == self._worker_N
        slot_P = is_at_PN.cumsum(0).gather(1, worker_P[:, None])[:, 0] - 1
        has_room_P = slot_P < self._capacity
        self.overflow += (~has_room_P).sum()
        place_P = torch.where(has_room_P, worker_P * self._capacity + slot_P, n_slots)
        token_P = torch.arange(ids_TK.numel(), device=ids_TK.device) // ids_TK.shape[1]
        self._out.expert_S.fill_(Slots.EMPTY)
        self._out.expert_S.index_copy_(0, place_P, ids_TK.flatten().to(torch.int32))
        self._out.x_SD.index_copy_(0, place_P, x_TD.index_select(0, token_P))
        self._group.to_workers(self._out.block[:n_slots]).wait()
        return Sent(x_TD.dtype, place_P.view(ids_TK.shape), weights_TK.gather(1, order_TK))

    def combine(self, handle: Sent) -> Tensor:
        """y_TD, in the dtype of the rows: the weighted sum, added in expert order in float32."""
        self._group.to_routers(self._back_SD[:-1]).wait()
        place_TK, weights_TK = handle.place_TK, handle.weights_TK
        y_TD = self._back_SD.index_select(0, place_TK[:, 0]).float() * weights_TK[:, :1]
        for k in range(1, place_TK.shape[1]):
            y_TD += self._back_SD.index_select(0, place_TK[:, k]).float() * weights_TK[:, k : k + 1]
        return y_TD.to(handle.dtype)

    def by(self, ops: Ops) -> None:
        """None: the experts are elsewhere."""

    def micro_batches(self, n_rows: int) -> int:
        """One: the ranks are in lockstep."""
        return 1


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


def masked_swiglu(x_SD: Tensor, expert_S: Tensor, experts: Mapping[int, tuple[Matrix, Matrix]]) -> Tensor:
    """`y[s] = expert(expert_S[s])(x[s])`, zeros where that is none of `experts`. No size depends on `expert_S`."""
    y_SD = torch.zeros_like(x_SD, memory_format=torch.contiguous_format)
    x_SD = x_SD.contiguous()
    ops = TorchOps(x_SD.device, x_SD.dtype)
    for expert, (w13, w2) in experts.items():
        is_its = expert_S[:, None] == expert
        y_SD = torch.where(is_its, ops.swiglu(x_SD, w13, w2), y_SD)
    return y_SD
