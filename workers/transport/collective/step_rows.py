"""What a step's layers exchange, and the words between the hosts around it.

Legend: T token rows, K choices a token, P = T * K pairs, C rows that a worker may give back, N workers, D hidden size.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = struct.Struct("<4s4xqIIII")
_STEP = b"STEP"
WORD_BYTES = _WORD.size


class StepWord(NamedTuple):
    """Of a router to its workers: a step begins. Of a worker to its router: it is done with it."""

    number: int  # rises
    n_rows: int  # T
    top_k: int  # K
    capacity: int  # C
    is_void: bool = False  # an expert was asked for that the worker does not hold

    @property
    def size(self) -> tuple[int, int, int]:
        """What a captured step is made for."""
        return self.n_rows, self.top_k, self.capacity

    def pack(self) -> bytearray:
        """As it travels."""
        return bytearray(_WORD.pack(_STEP, *self))

    @classmethod
    def parse(cls, block: memoryview) -> StepWord | None:
        """None: it is something else."""
        if bytes(block[:4]) != _STEP:
            return None
        _, number, n_rows, top_k, capacity, is_void = _WORD.unpack(block[:WORD_BYTES])
        return cls(number, n_rows, top_k, capacity, bool(is_void))


class Ask:
    """A layer's rows and choices on their way to all workers, in one piece of memory.

    All rows go to every worker: that is fewer bytes than a place for each pair at each, and no count is to be told.
    """

    def __init__(self, n_rows: int, top_k: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        row_bytes = n_rows * hidden_size * dtype.itemsize
        words_at = -(-row_bytes // 16) * 16
        #: uint8: what travels.
        self.block = torch.zeros(words_at + 4 * n_rows * top_k, dtype=torch.uint8, device=device)
        self.x_TD = self.block[:row_bytes].view(dtype).view(n_rows, hidden_size)
        #: int32 [P]: `worker << 16 | expert` of each pair, ascending by expert within a row; -1: nobody's.
        self.word_P = self.block[words_at:].view(torch.int32)


def places(is_at_PN: Tensor) -> Tensor:
    """For each pair how many before it are at the same worker; -1: it is at none."""
    return (is_at_PN.cumsum(0) * is_at_PN).sum(1) - 1
