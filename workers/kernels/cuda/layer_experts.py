"""The experts of one layer in a GPU's memory: slots that products find by a table, which a captured step follows."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cuda.experts import Slots, to_8_bits
from workers.kernels.experts import LayerExperts
from workers.kernels.weights import Matrix, WeightFormat


class CudaLayerExperts(LayerExperts):
    """Slots of equal size in one piece of memory each for w13 and w2.

    An expert that is put goes to a free slot, and then the table is changed: a captured step computes with it from its
    next replay on. While there is a free slot nothing is allocated; without one all are moved to a larger piece, after
    which steps have to be captured again.
    """

    def __init__(
        self, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat, device: torch.device
    ) -> None:
        super().__init__(n_experts, hidden_size, ffn_size, weight_format)
        self.device = device
        self._count_E = torch.zeros(n_experts, dtype=torch.int64, device=device)
        self._slot_E = torch.full((n_experts,), -1, dtype=torch.int32, device=device)
        self._slot_of: dict[int, int] = {}
        self._memory = self._allocated(0)

    @property
    def rows_E(self) -> Tensor:
        """int64 [E], on the host: the rows each expert computed since its weights came."""
        return self._count_E.cpu()

    @property
    def empty(self) -> bool:
        """Whether there is no slot at all."""
        return len(self._memory[0]) == 0

    @property
    def slots(self) -> Slots:
        """As the kernels take them."""
        w13, w2, s13, s2 = self._memory
        return Slots(w13, w2, self._slot_E, self._count_E, s13, s2, self.format.rows)

    def reserve(self, n_experts: int) -> None:
        """Room for so many experts, so that as many can be put without an allocation."""
        w13, w2, s13, s2 = self._memory
        if n_experts <= len(w13):
            return
        self._memory = larger = self._allocated(n_experts)
        for old, new in zip((w13, w2, s13, s2), larger, strict=True):
            if old is not None and new is not None:
                new[: len(old)] = old
        for expert, slot in self._slot_of.items():
            self._weights[expert] = self._views(slot)

    def put(self, expert: int, w13: Matrix, w2: Matrix) -> None:
        """Copy an expert's weights to a slot, in the slots' format, and name it in the table."""
        taken = set(self._slot_of.values())
        slot = self._slot_of.get(expert, next((s for s in range(self.n_experts) if s not in taken), 0))
        if slot >= len(self._memory[0]):
            self.reserve(min(self.n_experts, max(slot + 1, 2 * len(self._memory[0]))))
        for place, given in zip(self._views(slot), (w13, w2), strict=True):
            if place.scale_N is None or given.scale_N is not None:
                values, scale = given.values_ND, given.scale_N
            else:
                values, scale = to_8_bits(given.values_ND.to(self.device))
            place.values_ND.copy_(values)
            if place.scale_N is not None and scale is not None:
                place.scale_N.copy_(scale)
        self._count_E[expert] = 0
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the weights are there before anybody is sent to them
        self._slot_of[expert] = slot
        self._slot_E[expert] = slot
        self._weights[expert] = self._views(slot)

    def drop(self, expert: int) -> None:
        """Take an expert out of the table; its slot is free."""
        self._slot_E[expert] = -1
        del self._slot_of[expert], self._weights[expert]

    def _views(self, slot: int) -> tuple[Matrix, Matrix]:
        w13, w2, s13, s2 = self._memory
        return (
            Matrix(w13[slot], None if s13 is None else s13[slot]),
            Matrix(w2[slot], None if s2 is None else s2[slot]),
        )

    def _allocated(self, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        d, f, device = self.hidden_size, self.ffn_size, self.device
        w13 = torch.empty(n, 2 * f, d, dtype=self.format.dtype, device=device)
        w2 = torch.empty(n, d, f, dtype=self.format.dtype, device=device)
        if not self.format.scaled:
            return w13, w2, None, None
        return w13, w2, torch.empty(n, 2 * f, device=device), torch.empty(n, d, device=device)
