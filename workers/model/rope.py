"""Angles of the rotary position embedding; the rotation itself is a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """Computes the angles of a step's positions, once for all layers: a table of all positions would take 128 MB."""

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._frequencies_d = (1.0 / (theta**exponents)).repeat(2)

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, head_dim]; the second half repeats the first."""
        angles_Td = positions_T.to(torch.float32)[:, None] * self._frequencies_d
        return angles_Td.cos(), angles_Td.sin()
