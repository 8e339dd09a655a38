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


def kept(dtype: torch.dtype) -> frozenset[torch.dtype]:
    """What weights may be stored as to compute in `dtype` on a CPU, beside `dtype` itself.

    Weights of 16 bits are made float32 while they are read: half the memory, and half of what a decoding step reads.
    """
    if dtype is not torch.float32:
        return frozenset()
    return frozenset(narrow for narrow in (torch.bfloat16, torch.float16) if native.takes(narrow))


def with_unit_stride(x_TD: Tensor) -> Tensor:
    """`x`, copied if its rows are not contiguous in themselves."""
    return x_TD if x_TD.stride(-1) == 1 or x_TD.shape[-1] == 1 else x_TD.contiguous()


def apart(x_TD: Tensor) -> Tensor:
    """`x`, copied if its rows lie where a cache has room for few of them at a time."""
    return x_TD if 4 * x_TD.stride(0) % 4096 else native.rows_apart(*x_TD.shape).copy_(x_TD)


class PackedLinear:
    """`y_TN = x_TD @ weight_ND.T`, for any number of rows, in whatever way is fastest for that number.

    Keeps one resident copy of the weight, row-major, which serves both ways. Takes [T, D] (a non-contiguous view is
    fine) and returns a new contiguous [T, N]; both have one dtype, that of the weight or one it is `kept` for, and the
    device of the weight.
    """

    def __init__(self, weight_ND: Tensor) -> None:
        self.weight_ND = weight_ND.detach().contiguous()
        self.n_outputs, self.n_inputs = self.weight_ND.shape
        self._fast = self.weight_ND.is_cpu and native.takes(self.weight_ND.dtype)
        if self._fast:
            use_huge_pages(self.weight_ND)

    def __call__(self, x_TD: Tensor) -> Tensor:
        rows = x_TD.shape[0]
        if not self._fast or rows == 0 or x_TD.dtype is not torch.float32:
            return F.linear(x_TD, self.weight_ND.to(x_TD.dtype))
        if rows > FEW_ROWS and self.weight_ND.dtype is torch.float32:
            return F.linear(x_TD, self.weight_ND)
        return product(with_unit_stride(x_TD), self.weight_ND)


def product(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """The product by the compiled kernels; x float32, unit stride along D. Returns float32 [T, N]."""
    n_rows, k = x_TD.shape
    if n_rows > FEW_ROWS:
        x_TD = apart(x_TD)
    n = weight_ND.shape[0]
    y_TN = native.empty(n_rows, n)
    team = native.team(weight_ND.nbytes)
    scratch = native.empty(n_rows * team, dtype=torch.int64)
    panels = native.panels(team, k) if n_rows > FEW_ROWS else None
    native.linear(
        team,
        *(x_TD.data_ptr(), 4 * x_TD.stride(0), weight_ND.data_ptr(), y_TN.data_ptr(), n_rows, k, n),
        *(scratch.data_ptr(), native.KINDS[weight_ND.dtype], *native.where(panels)),
    )
    return y_TN
