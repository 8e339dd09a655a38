"""The router's side of fixed capacity: the `Experts` of a decode step that can be captured as a CUDA graph.

Legend: T token rows, K experts a token, P = T * K pairs, N workers, C slots at each worker, D hidden size, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.transport.fixed_group import FixedGroup, Slots, Word


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

    def micro_batches(self, n_rows: int) -> int:
        """One: the ranks are in lockstep."""
        return 1
