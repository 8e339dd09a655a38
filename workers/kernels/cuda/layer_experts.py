"""The experts of one layer in a GPU's memory: slots that products find by a table, which a captured step follows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from workers.device import on_host
from workers.kernels.cuda.experts import Slots
from workers.kernels.cuda.slot_pool import SlotPool
from workers.kernels.experts import LayerExperts
from workers.weights import Matrix, WeightFormat


class CudaLayerExperts(LayerExperts):
    """A layer's part of a `SlotPool`.

    An expert that is put goes to a free slot, and then the table is changed: a captured step computes with it from its
    next replay on.
    """

    def __init__(
        self, index: int, count_LE: Tensor, hidden_size: int, ffn_size: int, weight_format: WeightFormat, pool: SlotPool
    ) -> None:
        """index: of the layer. count_LE: int64 on the device, what kernels count rows in, of all layers of the pool."""
        n_experts = count_LE.shape[1]
        super().__init__(n_experts, hidden_size, ffn_size, weight_format)
        self.device = pool.device
        self._pool = pool
        self._count_LE, self._count_E = count_LE, count_LE[index]
        self._slot_E = torch.full((n_experts,), -1, dtype=torch.int32, device=pool.device)
        self._slot_of: dict[int, int] = {}
        self._viewed: Tensor | None = None  # the memory that the views are of

    @property
    def rows_E(self) -> Tensor:
        """int64 [E], on the host: the rows each expert computed since its weights came."""
        return self._count_E.cpu()

    def counted(self) -> Tensor:
        """`rows_E` of all layers, [L, E]: one copy, on a stream of its own. Whoever asks may have to answer others, and
        a copy after what the step loop has launched would keep it for a step."""
        if self.device.type != "cuda":
            return self._count_LE.clone()
        with torch.cuda.stream(_reading(self.device)):
            return on_host(self._count_LE)[0]

    @property
    def empty(self) -> bool:
        """Whether there is no slot at all."""
        return len(self._pool) == 0

    @property
    def slots(self) -> Slots:
        """As the kernels take them."""
        pool = self._pool
        return Slots(pool.w13, pool.w2, self._slot_E, self._count_E, pool.s13, pool.s2, self.format.rows)

    @property
    def held(self) -> frozenset[int]:
        """The experts that have weights here."""
        return frozenset(self._slot_of)

    @property
    def weights(self) -> Mapping[int, tuple[Matrix, Matrix]]:
        """w13 and w2 of the experts that have weights here."""
        if self._viewed is not self._pool.w13:
            self._viewed = self._pool.w13
            self._weights = {expert: self._pool.views(slot) for expert, slot in self._slot_of.items()}
        return self._weights

    def reserve(self, n_experts: int) -> None:
        """Take memory for so many experts of all layers."""
        self._pool.reserve(n_experts)

    def put(self, expert: int, w13: Matrix, w2: Matrix) -> None:
        """Copy an expert's weights, which are of the slots' format, to a slot, and name it in the table.

        Raises DeviceError when no slot is free.
        """
        slot = self._slot_of[expert] if expert in self._slot_of else self._pool.take()
        for place, given in zip(self._pool.views(slot), (w13, w2), strict=True):
            place.values_ND.copy_(given.values_ND)
            if place.scale_N is not None and given.scale_N is not None:
                place.scale_N.copy_(given.scale_N)
        self._count_E[expert] = 0
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the weights are there before anybody is sent to them
        self._slot_of[expert] = slot
        self._slot_E[expert] = slot
        self._weights[expert] = self._pool.views(slot)

    def drop(self, expert: int) -> None:
        """Take an expert out of the table; its slot is free."""
        self._slot_E[expert] = -1
        self._weights.pop(expert, None)
        self._pool.give(self._slot_of.pop(expert))


@cache
def _reading(device: torch.device) -> torch.cuda.Stream:
    """The stream on which counts come to the host. Of a priority that nobody else asks for: torch hands its streams out
    in turn, and one on which a step is being captured may not be waited for."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
