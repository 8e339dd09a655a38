"""RMSNorm, alone and after a residual addition."""

from __future__ import annotations

from torch import Tensor

from workers.kernels import reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, the mean square in float32. Returns a new [T, D] in the dtype of x."""
    return reference.rms_norm(x_TD, weight_D, eps)


def add_rms_norm(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual += delta` in place, then the norm of it. Returns a new [T, D]."""
    residual_TD += delta_TD
    return reference.rms_norm(residual_TD, weight_D, eps)
