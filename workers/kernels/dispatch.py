"""A router's dispatch: the (token, expert) pairs sorted by worker, and the weighted sum of the rows that come back.

Compiled, because a decode step does both once per layer on a handful of rows, where every call into numpy or torch
costs as much as the work itself; in plain numpy and torch where the kernels are not to be had.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels import native
from workers.kernels.linear import with_unit_stride
from workers.kernels.native import HEADER_BYTES

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
        *("n_choices", "n_pairs", "n_tokens", "n_workers"),
    )

    def __init__(self, n_tokens: int, n_choices: int, n_experts: int, n_workers: int, row_bytes: int = 0) -> None:
        """`row_bytes`: of a row of x, where there shall be room for requests."""
        self.n_tokens, self.n_choices, self.n_workers = n_tokens, n_choices, n_workers
        self.n_pairs = n_pairs = n_tokens * n_choices
        self._place = 3 * (n_workers + 1)
        self._row = self._place + n_pairs
        self._halves = self._row + n_pairs
        self._messages = self._halves + (3 * n_pairs + 1) // 2 + n_experts + n_tokens
        self._row_bytes = row_bytes
        room = n_pairs * (self.message_bytes(1, 1) + 8) // 8 if row_bytes else 0
        self.memory = np.empty(self._messages + room, np.int64)
        self.address = _address(self.memory)

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
    def place_address(self) -> int:
        """Of `place_TK`."""
        return self.address + 8 * self._place

    @property
    def weights_address(self) -> int:
        """Of `weights_TK`."""
        return self.address + 8 * self._halves


def plan(
    ids_TK: Tensor,
    weights_TK: Tensor,
    owner_E: Ints,
    n_workers: int,
    counter_E: Ints,
    pack_TD: Tensor | None = None,
) -> Plan:
    """Sort the pairs of a dispatch. `owner_E[e]` is the worker of expert e, 0 ... n_workers - 1.

    ids_TK: int64, distinct within a row; weights_TK: float32; both on the host. counter_E: the pairs of each expert
    are added to it. pack_TD: rows of which to make the workers' requests; float32 on the host, and the kernels usable.
    """
    n_tokens, n_choices = ids_TK.shape
    if not native.usable():
        made = Plan(n_tokens, n_choices, len(owner_E), n_workers)
        _plan_in_numpy(made, ids_TK.numpy(), weights_TK.numpy(), owner_E, counter_E)
        return made
    x, x_stride, d = 0, 0, 0
    if pack_TD is not None:
        pack_TD = with_unit_stride(pack_TD)
        x, x_stride, d = pack_TD.data_ptr(), 4 * pack_TD.stride(0), pack_TD.shape[1]
    made = Plan(n_tokens, n_choices, len(owner_E), n_workers, 4 * d)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    native.dispatch_plan.alone(
        *(ids_TK.data_ptr(), weights_TK.data_ptr(), _address(owner_E), _address(counter_E)),
        *(n_tokens, n_choices, len(owner_E), n_workers, made.address),
        *(made.messages_address, x, x_stride, d),
    )
    return made


def weighted_sum(rows_PD: Tensor, plan: Plan) -> Tensor:
    """`y[t] = sum over k of weights[t, k] * rows[place[t, k]]`, added in the order of k in float32; dtype of rows.

    `rows_PD` is contiguous and used up: where it is the sum already, it is what comes back.
    """
    if not (rows_PD.is_cpu and rows_PD.dtype is torch.float32 and native.usable()):
        return _weighted_sum_in_torch(rows_PD, plan)
    rows, place, weights, d = rows_PD.data_ptr(), plan.place_address, plan.weights_address, rows_PD.shape[1]
    if plan.n_choices == 1 and native.weigh_rows.alone(rows, place, weights, plan.n_tokens, d):
        return rows_PD
    y_TD = torch.empty(plan.n_tokens, d)
    native.weighted_sum.alone(rows, place, weights, y_TD.data_ptr(), plan.n_tokens, plan.n_choices, d)
    return y_TD


def _plan_in_numpy(made: Plan, ids_TK: Ints, weights_TK: Floats, owner_E: Ints, counter_E: Ints) -> None:
    """Fill a plan without the kernels."""
    n_experts, n_workers, ids_P = len(owner_E), made.n_workers, ids_TK.ravel()
    counter_E += np.bincount(ids_P, minlength=n_experts)
    order_P = np.argsort(owner_E[ids_P] * n_experts + ids_P, kind="stable")
    place_P = np.empty_like(order_P)
    place_P[order_P] = np.arange(len(order_P))
    rank_TK = ids_TK.argsort(axis=1)
    made.place_TK[:] = np.take_along_axis(place_P.reshape(ids_TK.shape), rank_TK, 1)
    made.weights_TK[:] = np.take_along_axis(weights_TK, rank_TK, 1)
    token_P, (local_P, expert_P) = order_P // made.n_choices, made.pairs
    expert_P[:] = ids_P[order_P]
    cuts = [0, *np.bincount(owner_E[ids_P], minlength=n_workers).cumsum()]
    row_cuts = [0]
    for begin, end in pairwise(cuts):
        row_R, local_P[begin:end] = np.unique(token_P[begin:end], return_inverse=True)
        row_cuts.append(row_cuts[-1] + len(row_R))
        made.row_P[row_cuts[-2] : row_cuts[-1]] = row_R
    made.memory[: 2 * (n_workers + 1)] = cuts + row_cuts  # nothing is packed: the rest means nothing


def _weighted_sum_in_torch(rows_PD: Tensor, plan: Plan) -> Tensor:
    """`weighted_sum` on any device in any dtype."""
    place_TK, weights_TK = (torch.from_numpy(array).to(rows_PD.device) for array in (plan.place_TK, plan.weights_TK))
    total_TD = rows_PD.index_select(0, place_TK[:, 0]).float().mul_(weights_TK[:, :1])
    for k in range(1, plan.n_choices):
        total_TD += rows_PD.index_select(0, place_TK[:, k]).float().mul_(weights_TK[:, k : k + 1])
    return total_TD.to(rows_PD.dtype)


def _address(array: Ints) -> int:
    """Where a writable array that is not empty begins; numpy's own ways to tell take three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
