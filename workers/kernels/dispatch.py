"""A dispatch: its (token, expert) pairs sorted by worker and expert, as `Ops.dispatch_plan` makes it.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]


class Plan:
    """The pairs of a dispatch, ordered by (worker, expert, token), and the rows that each worker needs.

    All of it is one piece of memory, for at a handful of rows an array of its own costs as much as the sorting:
    int64 first_W [W + 1], first_row_W [W + 1], place_TK, row_P; float32 weights_TK; int32 token_P, expert_P; int64 room
    for the kernel to work in.
    """

    __slots__ = (
        *("_halves", "_place", "_row", "address", "memory"),
        *("n_choices", "n_experts", "n_pairs", "n_tokens", "n_workers"),
    )

    def __init__(self, n_tokens: int, n_choices: int, n_experts: int, n_workers: int) -> None:
        self.n_tokens, self.n_choices = n_tokens, n_choices
        self.n_experts, self.n_workers = n_experts, n_workers
        self.n_pairs = n_pairs = n_tokens * n_choices
        self._place = 2 * (n_workers + 1)
        self._row = self._place + n_pairs
        self._halves = self._row + n_pairs
        self.memory = np.empty(self._halves + (3 * n_pairs + 1) // 2 + n_experts + n_tokens, np.int64)
        self.address = address(self.memory)

    def cuts(self) -> tuple[list[int], list[int]]:
        """Where each worker's pairs begin, and where the rows it needs do, in `row_P`. W + 1 of each."""
        n, all_ = self.n_workers + 1, self.memory[: self._place].tolist()
        return all_[:n], all_[n:]

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
    def cuts_address(self) -> tuple[int, int]:
        """Of what `cuts` gives."""
        return self.address, self.address + 8 * (self.n_workers + 1)

    @property
    def row_address(self) -> int:
        """Of `row_P`."""
        return self.address + 8 * self._row

    @property
    def place_address(self) -> int:
        """Of `place_TK`."""
        return self.address + 8 * self._place

    @property
    def weights_address(self) -> int:
        """Of `weights_TK`."""
        return self.address + 8 * self._halves


def address(memory: Ints | memoryview) -> int:
    """Where writable memory that is not empty begins; numpy's own ways to tell take three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # type: ignore[arg-type]
