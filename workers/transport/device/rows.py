"""What a router and its workers share of a step: rows out, rows back, whose each pair is, whose turn it is.

Legend: T token rows at most, K choices a token, P = T * K pairs, D hidden size, N workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LINE = 128  # bytes: what two sides poll or write lies apart
_FLAG_STRIDE = _LINE // 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in one piece of memory of the router's device, which the workers map."""

    n_rows: int  # T
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    n_workers: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the memory."""
        return self._y_at + _aligned(self.n_rows * self.top_k * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden_size * self.dtype.itemsize

    @property
    def _word_at(self) -> int:
        return (1 + self.n_workers) * _LINE

    @property
    def _x_at(self) -> int:
        return self._word_at + _aligned(4 * self.n_rows * self.top_k)

    @property
    def _y_at(self) -> int:
        return self._x_at + _aligned(self.n_rows * self.row_bytes)


class StepRows:
    """Views of that memory, of either side."""

    def __init__(self, memory: Tensor, layout: Layout) -> None:
        """memory: uint8 [layout.n_bytes]."""
        t, k, d = layout.n_rows, layout.top_k, layout.hidden_size
        flags = memory[: (1 + layout.n_workers) * _LINE].view(torch.int64)
        self.layout = layout
        #: int64 [1]: the router has written its rows of the layer that this says.
        self.asked = flags[:1]
        #: int64 [N, stride]: worker n, in [n, 0], has written its rows of the layer that this says.
        self.done = flags[_FLAG_STRIDE:].view(layout.n_workers, _FLAG_STRIDE)
        #: int32 [P]: `worker << 16 | expert` of each pair, ascending by expert within a row; -1: nobody's.
        self.word_P = _view(memory, layout._word_at, torch.int32, t * k)
        self.x_TD = _view(memory, layout._x_at, layout.dtype, t * d).view(t, d)
        #: The row of the pair in `word_P`, unweighted.
        self.y_PD = _view(memory, layout._y_at, layout.dtype, t * k * d).view(t * k, d)


def _view(memory: Tensor, begin: int, dtype: torch.dtype, n: int) -> Tensor:
    return memory[begin : begin + n * dtype.itemsize].view(dtype)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _LINE) * _LINE
