"""Weights as they are stored. What is special about a format is said in its entry of `FORMATS`, and asked of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear map of N outputs and D inputs: `y = (x @ values.T) * scale + bias`."""

    values_ND: Tensor
    scale_N: Tensor | None = None  # float32
    bias_N: Tensor | None = None  # in the dtype of the rows

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.values_ND, self.scale_N, self.bias_N) if tensor is not None)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What the numbers of a weight matrix are stored as.

    `name`: in configurations. `file_dtype`: in the header of a safetensors file; empty: made when weights are loaded.
    `scaled`: one float32 for each output belongs to the values. `rows`: what is multiplied with them is made of that
    dtype too, with one float32 for each row.
    """

    name: str
    dtype: torch.dtype
    file_dtype: str = ""
    scaled: bool = False
    rows: bool = False

    def bytes(self, n_outputs: int, n_inputs: int) -> int:
        """Bytes of a matrix of that size, without a bias."""
        return n_outputs * (n_inputs * self.dtype.itemsize + 4 * self.scaled)

    def expert_bytes(self, hidden_size: int, ffn_size: int) -> int:
        """Bytes of one expert: gate, up and down."""
        return self.bytes(2 * ffn_size, hidden_size) + self.bytes(hidden_size, ffn_size)

    def made_of(self, dtype: torch.dtype) -> WeightFormat:
        """The format in which weights are read that are to become this one, where rows are of `dtype`."""
        return format_of(dtype) if self.scaled else self

    def make(self, values_ND: Tensor) -> Matrix:
        """A matrix of this format of weights in one without scales; those of its own dtype are kept, not copied."""
        if not self.scaled:
            return Matrix(values_ND.to(self.dtype))
        wide_ND = values_ND.float()
        scale_N = wide_ND.abs().amax(1).clamp_min(1e-12) / torch.finfo(self.dtype).max
        return Matrix((wide_ND / scale_N[:, None]).to(self.dtype), scale_N)


#: Every format, by name. Which of them a device's kernels multiply with is the device's: `kernels.select.formats_for`.
FORMATS = {
    each.name: each
    for each in (
        WeightFormat("float32", torch.float32, "F32"),
        WeightFormat("bfloat16", torch.bfloat16, "BF16"),
        WeightFormat("float16", torch.float16, "F16"),
        WeightFormat("fp8", torch.float8_e4m3fn, scaled=True),
        WeightFormat("fp8-rows", torch.float8_e4m3fn, scaled=True, rows=True),
    )
}
#: Those that checkpoints are stored in, by what their files call them; as values alone, so by dtype too.
IN_FILES = {each.file_dtype: each for each in FORMATS.values() if each.file_dtype}
_BY_DTYPE = {each.dtype: each for each in IN_FILES.values()}


def format_of(dtype: torch.dtype) -> WeightFormat:
    """Values of `dtype` and nothing beside them."""
    return _BY_DTYPE[dtype]


def kept_in(stored: WeightFormat, formats: Collection[WeightFormat], dtype: torch.dtype) -> WeightFormat:
    """What `stored` weights are kept in: as they are if that is one of `formats`, else as `dtype`."""
    return stored if stored in formats else format_of(dtype)
