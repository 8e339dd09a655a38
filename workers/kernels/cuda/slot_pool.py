"""The memory in which the experts of all layers lie on a GPU, in slots."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.errors import DeviceError
from workers.weights import Matrix, WeightFormat


class SlotPool:
    """Slots of one size that all layers of a shard share: whichever layer an expert moves to, there is one free for it.

    Captured steps have the memory's address. So it is taken once, by `reserve`; without, it grows as it is needed,
    which nobody who captures may want.
    """

    def __init__(self, hidden_size: int, ffn_size: int, weight_format: WeightFormat, device: torch.device) -> None:
        self.device = device
        self._sizes = (hidden_size, ffn_size, weight_format)
        self._is_reserved = False
        self._free: list[int] = []  # descending: the lowest is taken next
        self.w13, self.w2, self.s13, self.s2 = self._allocated(0)  # [S, 2F, D], [S, D, F], float32 [S, 2F], [S, D]

    def __len__(self) -> int:
        return len(self.w13)

    def reserve(self, n_slots: int) -> None:
        """Take memory for so many slots, once and for all."""
        self._grow(n_slots)
        self._is_reserved = True

    def take(self) -> int:
        """A free slot, the lowest. Raises DeviceError when there is none."""
        if not self._free:
            if self._is_reserved:
                raise DeviceError(f"all {len(self)} slots for experts are taken")
            self._grow(max(8, 2 * len(self)))
        return self._free.pop()

    def give(self, slot: int) -> None:
        """A slot is free."""
        self._free.append(slot)
        self._free.sort(reverse=True)

    def views(self, slot: int) -> tuple[Matrix, Matrix]:
        """w13 and w2 of a slot."""
        return (
            Matrix(self.w13[slot], None if self.s13 is None else self.s13[slot]),
            Matrix(self.w2[slot], None if self.s2 is None else self.s2[slot]),
        )

    def _grow(self, n_slots: int) -> None:
        n_before = len(self)
        if n_slots <= n_before:
            return
        before = (self.w13, self.w2, self.s13, self.s2)
        self.w13, self.w2, self.s13, self.s2 = larger = self._allocated(n_slots)
        for old, new in zip(before, larger, strict=True):
            if old is not None and new is not None:
                new[:n_before] = old
        self._free = [*reversed(range(n_before, n_slots)), *self._free]

    def _allocated(self, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        (d, f, made), device = self._sizes, self.device
        w13 = torch.empty(n, 2 * f, d, dtype=made.dtype, device=device)
        w2 = torch.empty(n, d, f, dtype=made.dtype, device=device)
        if not made.scaled:
            return w13, w2, None, None
        return w13, w2, torch.empty(n, 2 * f, device=device), torch.empty(n, d, device=device)
