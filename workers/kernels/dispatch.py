"""A dispatch: its (token, expert) pairs sorted by worker and expert, as `Ops.dispatch_plan` makes it.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from workers.kernels.message import HEADER_BYTES

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]

_PAIR_BYTES = 8


class Plan:
    """The pairs of a dispatch, ordered by (worker, expert, token), and the rows that each worker needs.

    All of it is one piece of memory, for at a handful of rows an array of its own costs as much as the sorting:
    int64 first_W [W + 1], first_row_W [W + 1], first_byte_W [W + 1], place_TK, row_P; float32 weights_TK; int32
    token_P, expert_P; int64 room for the kernel to work in; room for every worker's request.
    """

    __slots__ = (
        *("_halves", "_messages", "_place", "_row", "_row_bytes", "address", "memory"),
        *("n_choices", "n_experts", "n_pairs", "n_tokens", "n_workers"),
    )

    def __init__(self, n_tokens: int, n_choices: int, n_experts: int, n_workers: int, row_bytes: int = 0) -> None:
        """`row_bytes`: of a row of x, where there shall be room for requests."""
        self.n_tokens, self.n_choices = n_tokens, n_choices
        self.n_experts, self.n_workers = n_experts, n_workers
        self.n_pairs = n_pairs = n_tokens * n_choices
        self._place = 3 * (n_workers + 1)
        self._row = self._place + n_pairs
        self._halves = self._row + n_pairs
        self._messages = self._halves + (3 * n_pairs + 1) // 2 + n_experts + n_tokens
        self._row_bytes = row_bytes
        room = n_pairs * (self.message_bytes(1, 1) + 8) // 8 if row_bytes else 0
        self.memory = np.empty(self._messages + room, np.int64)
        self.address = address(self.memory)

    def cuts(self) -> tuple[list[int], list[int], list[int]]:
        """Where each worker's pairs begin; where the rows it needs do, in `row_P`; and, where there are `messages`,
        its request in those, which may be followed by unused bytes. W + 1 of each."""
        n, all_ = self.n_workers + 1, self.memory[: self._place].tolist()
        return all_[:n], all_[n : 2 * n], all_[2 * n :]

    @property
    def is_packed(self) -> bool:
        """Whether there are `messages`."""
        return self._row_bytes > 0

    def message_bytes(self, n_rows: int, n_pairs: int) -> int:
        """The length of a worker's request."""
        return HEADER_BYTES + n_rows * self._row_bytes + n_pairs * _PAIR_BYTES

    @property
    def messages(self) -> memoryview:
        """Every worker's request, where the plan `is_packed`, but for the HEADER_BYTES at its beginning."""
        return self.memory.data.cast("B")[8 * self._messages :]

    @property
    def messages_address(self) -> int:
        """Of `messages`; 0: there are none."""
        return self.address + 8 * self._messages if self.is_packed else 0

    @property
    def place_TK(self) -> Ints:
        """The pair of each token's experts, in expert order."""
        return self.memory[self._place : self._row].reshape(self.n_tokens, self.n_choices)

    @property
    def row_P(self) -> Ints:
        """The rows of the dispatch that worker after worker needs, ascending; what follows the last one's is unused."""
        return self.memory[self._row : self._halves]

    @property
    def weights_TK(self) -> Floats:
        """The weight of each token's experts, in expert order."""
        halves = self.memory[self._halves :].view(np.float32)
        return halves[: self.n_pairs].reshape(self.n_tokens, self.n_choices)

    @property
    def pairs(self) -> tuple[Int32s, Int32s]:
        """token_P, which of its worker's rows a pair is, and expert_P."""
        halves = self.memory[self._halves :].view(np.int32)
        return halves[self.n_pairs : 2 * self.n_pairs], halves[2 * self.n_pairs : 3 * self.n_pairs]

    @property
    def pairs_address(self) -> tuple[int, int]:
        """Of token_P and expert_P."""
        first = self.address + 8 * self._halves + 4 * self.n_pairs
        return first, first + 4 * self.n_pairs

    @property
    def place_address(self) -> int:
        """Of `place_TK`."""
        return self.address + 8 * self._place

    @property
    def weights_address(self) -> int:
        """Of `weights_TK`."""
        return self.address + 8 * self._halves


def address(array: Ints) -> int:
    """Where a writable array that is not empty begins; numpy's own ways to tell take three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
