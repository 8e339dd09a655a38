"""Matrix products of the dense half: query/key/value, output, gate and head projections."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """`y_TN = x_TD @ weight_ND.T`, for any number of rows, in whatever way is fastest for that number.

    Keeps one resident copy of the weight. Takes [T, D] (a non-contiguous view is fine) and returns a new contiguous
    [T, N]; both have the dtype and device of the weight.
    """

    def __init__(self, weight_ND: Tensor) -> None:
        self.weight_ND = weight_ND.detach().contiguous()

    @property
    def n_outputs(self) -> int:
        return self.weight_ND.shape[0]

    @property
    def n_inputs(self) -> int:
        return self.weight_ND.shape[1]

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_ND)
