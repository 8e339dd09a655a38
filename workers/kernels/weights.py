"""Weights as they are stored: the one place that knows what a format is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What the numbers of a weight matrix are stored as.

    `scaled`: one float32 for each output belongs to them. `rows`: what is multiplied with them is made of that dtype
    too, with one float32 for each row.
    """

    dtype: torch.dtype
    scaled: bool = False
    rows: bool = False

    def bytes(self, n_outputs: int, n_inputs: int) -> int:
        """Bytes of a matrix of that size, without a bias."""
        return n_outputs * (n_inputs * self.dtype.itemsize + 4 * self.scaled)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear map of N outputs and D inputs: `y = (x @ values.T) * scale + bias`."""

    values_ND: Tensor
    scale_N: Tensor | None = None  # float32
    bias_N: Tensor | None = None  # in the dtype of the rows

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(self.values_ND.dtype, self.scale_N is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.values_ND, self.scale_N, self.bias_N) if tensor is not None)

    def rows(self, begin: int, end: int) -> Matrix:
        """The outputs begin:end, in the same memory."""
        parts = (None if t is None else t[begin:end] for t in (self.values_ND, self.scale_N, self.bias_N))
        values, scale, bias = parts
        assert values is not None
        return Matrix(values, scale, bias)


def expert_format(name: str, dtype: torch.dtype) -> WeightFormat:
    """What `--expert-dtype` means: "fp8" (weights in e4m3), "fp8-rows" (rows too); anything else: `dtype`."""
    if name not in ("fp8", "fp8-rows"):
        return WeightFormat(dtype)
    return WeightFormat(torch.float8_e4m3fn, scaled=True, rows=name == "fp8-rows")
