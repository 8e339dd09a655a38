"""A process group that steps through the layers in lockstep, with blocks of a fixed size between routers and workers.

Nothing in a step depends on what the gate chose: counts stay on the device, and the host decides nothing between the
step's header and its last layer. So a step can be captured as a CUDA graph; over gloo it runs the same way.

Legend: N workers, M routers, C rows of capacity for each router at each worker, D hidden size, B bytes of a slot.
"""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from workers.transport.collective_mesh import c10d, connect_store, gloo_interface
from workers.transport.group import Group

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
