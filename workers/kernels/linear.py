"""Matrix products of the dense half: query/key/value, output, gate and head projections.

Legend: T token rows, D inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels import native
from workers.kernels.memory import use_huge_pages
from workers.kernels.native import FEW_ROWS


def is_fast(tensor: Tensor) -> bool:
    """Whether the compiled CPU kernels take it: float32 in host memory."""
    return tensor.dtype == torch.float32 and tensor.is_cpu and native.usable()


def with_unit_stride(x_TD: Tensor) -> Tensor:
    """`x`, copied if its rows are not contiguous in themselves."""
    return x_TD if x_TD.stride(-1) == 1 or x_TD.shape[-1] == 1 else x_TD.contiguous()


class PackedLinear:
    """`y_TN = x_TD @ weight_ND.T`, for any number of rows, in whatever way is fastest for that number.

    Keeps one resident copy of the weight, row-major, which serves both ways. Takes [T, D] (a non-contiguous view is
    fine) and returns a new contiguous [T, N]; both have the dtype and device of the weight.
    """

    def __init__(self, weight_ND: Tensor) -> None:
        self.weight_ND = weight_ND.detach().contiguous()
        self.n_outputs, self.n_inputs = self.weight_ND.shape
        self._fast = is_fast(self.weight_ND)
        if self._fast:
            use_huge_pages(self.weight_ND)

    def __call__(self, x_TD: Tensor) -> Tensor:
        rows = x_TD.shape[0]
        if not self._fast or rows > FEW_ROWS or rows == 0:
            return F.linear(x_TD, self.weight_ND)
        return few_rows(with_unit_stride(x_TD), self.weight_ND)


def few_rows(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """The product by the streaming kernel; float32, unit stride along D. Returns [T, N]."""
    n_rows, k = x_TD.shape
    n = weight_ND.shape[0]
    y_TN = native.empty(n_rows, n)
    team = native.team(4 * n * k)
    scratch = native.empty(n_rows * team, dtype=torch.int64)
    native.linear(
        team,
        *(x_TD.data_ptr(), 4 * x_TD.stride(0), weight_ND.data_ptr(), y_TN.data_ptr(), n_rows, k, n),
        scratch.data_ptr(),
    )
    return y_TN
