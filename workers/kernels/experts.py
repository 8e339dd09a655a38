"""The experts of one layer: grouped SwiGLU over the (token, expert) pairs of a batch.

Legend: T token rows, P pairs, K choices a token, E experts, D hidden, F ffn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels import reference


class LayerExperts:
    """The expert weights of one layer that live on one device, and the products with them.

    Not thread-safe: `ExpertShard` takes a lock around every call.
    """

    def __init__(
        self, n_experts: int, hidden_size: int, ffn_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.n_experts = n_experts
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.device = device
        self.dtype = dtype
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def held(self) -> frozenset[int]:
        """The experts that have weights here."""
        return frozenset(self._weights)

    def put(self, expert: int, w13_2FD: Tensor, w2_DF: Tensor) -> None:
        """Give `expert` its weights: w1 (gate) over w3 (up), and w2 (down). Kept, not copied."""
        self._weights[expert] = (w13_2FD, w2_DF)

    def drop(self, expert: int) -> None:
        """Forget the weights of `expert`."""
        del self._weights[expert]

    def forward(self, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        """`y[p] = expert(expert_P[p])(x[token_P[p]])`, unweighted; pairs ascend by expert. Returns [P, D].

        Every expert named must be held.
        """
        return reference.grouped_swiglu(x_TD, token_P, expert_P, self._weights)

    def forward_combined(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, added in expert order in float32. Returns [T, D], dtype of x."""
        order_P = torch.argsort(expert_ids_TK.flatten(), stable=True)
        token_P = order_P // expert_ids_TK.shape[1]
        y_PD = self.forward(x_TD, token_P, expert_ids_TK.flatten()[order_P])
        return reference.combine(y_PD, token_P, weights_TK.flatten()[order_P], len(x_TD)).to(x_TD.dtype)
