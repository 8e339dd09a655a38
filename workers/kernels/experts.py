"""The expert weights of one layer that live on one device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.weights import Matrix, WeightFormat


class LayerExperts:
    """Slots for the experts of one layer. It only holds them: the products are the `Ops`'.

    Not thread-safe: `ExpertShard` locks around every change and every product.
    """

    def __init__(self, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat) -> None:
        self.n_experts = n_experts
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.format = weight_format
        self._rows_E = torch.zeros(n_experts, dtype=torch.int64)
        #: int64 [E, 2], on the host: the addresses of w13 and w2; 0: not held.
        self.address_E2 = torch.zeros(n_experts, 2, dtype=torch.int64)
        self._weights: dict[int, tuple[Matrix, Matrix]] = {}

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.format.expert_bytes(self.hidden_size, self.ffn_size)

    @property
    def rows_E(self) -> Tensor:
        """int64 [E], on the host: the rows each expert computed since its weights came."""
        return self._rows_E

    @property
    def held(self) -> frozenset[int]:
        """The experts that have weights here."""
        return frozenset(self._weights)

    @property
    def weights(self) -> Mapping[int, tuple[Matrix, Matrix]]:
        """w13 and w2 of the experts that have weights here."""
        return self._weights

    def reserve(self, n_experts: int) -> None:
        """Take memory for so many experts, where all layers' lie in one piece."""

    def put(self, expert: int, w13: Matrix, w2: Matrix) -> None:
        """Give `expert` its weights: w1 (gate) over w3 (up) [2F, D], and w2 (down) [D, F]; kept, not copied."""
        self._weights[expert] = (w13, w2)
        self.address_E2[expert] = torch.tensor([w13.values_ND.data_ptr(), w2.values_ND.data_ptr()])
        self.rows_E[expert] = 0

    def drop(self, expert: int) -> None:
        """Forget the weights of `expert`."""
        del self._weights[expert]
        self.address_E2[expert] = 0

    def missing(self, expert_ids: Tensor) -> list[int]:
        """The experts among `expert_ids` that have no weights here, ascending."""
        return sorted(set(expert_ids.flatten().tolist()) - self.held)
