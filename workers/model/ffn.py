"""The FFN that all tokens go through: that of a layer without experts, or the shared expert beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.checkpoint import ExpertWeights
from workers.kernels.ops import Ops


class FFN:
    """`w2 (silu(w1 x) * (w3 x))`, times `sigmoid(gate x)` where it has a gate of its own."""

    def __init__(self, weights: ExpertWeights, gate_1D: Tensor | None, ops: Ops) -> None:
        self._w13 = ops.matrix(torch.cat((weights.w1_FD, weights.w3_FD)))
        self._w2 = ops.matrix(weights.w2_DF)
        self._gate = None if gate_1D is None else ops.matrix(gate_1D)

    def __call__(self, ops: Ops, x_TD: Tensor) -> Tensor:
        """A new [T, D]."""
        return ops.swiglu(x_TD, self._w13, self._w2, self._gate)
