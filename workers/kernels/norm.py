"""RMSNorm, alone and after a residual addition.

Legend: T token rows, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from workers.kernels import native, reference
from workers.kernels.linear import is_fast, with_unit_stride


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, the mean square in float32. Returns a new [T, D] in the dtype of x."""
    if not is_fast(x_TD):
        return reference.rms_norm(x_TD, weight_D, eps)
    x_TD = with_unit_stride(x_TD)
    n_rows, d = x_TD.shape
    y_TD = native.empty(n_rows, d)
    native.rms_norm(
        _team(n_rows, d),
        *(x_TD.data_ptr(), 4 * x_TD.stride(0), weight_D.data_ptr(), y_TD.data_ptr()),
        *(n_rows, d, native.float_bits(eps)),
    )
    return y_TD


def add_rms_norm(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual += delta` in place, then the norm of it. Returns a new [T, D]."""
    if not is_fast(residual_TD) or not is_fast(delta_TD) or residual_TD.stride(-1) != 1:
        residual_TD += delta_TD
        return reference.rms_norm(residual_TD, weight_D, eps)
    delta_TD = with_unit_stride(delta_TD)
    n_rows, d = residual_TD.shape
    y_TD = native.empty(n_rows, d)
    native.add_rms_norm(
        _team(n_rows, d),
        *(residual_TD.data_ptr(), 4 * residual_TD.stride(0), delta_TD.data_ptr(), 4 * delta_TD.stride(0)),
        *(weight_D.data_ptr(), y_TD.data_ptr(), n_rows, d, native.float_bits(eps)),
    )
    return y_TD


def _team(n_rows: int, d: int) -> int:
    return native.team(4 * n_rows * d)
