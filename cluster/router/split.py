"""A dispatch cut into one part per worker, and the parts put together again.

Compiled, because a decode step does both once per layer on a handful of rows, where every call into numpy or torch
costs as much as the work itself.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, E experts, W workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]


class Piece(NamedTuple):
    """What one worker computes: token rows, each there once, and the pairs on them, ascending by expert."""

    worker: int
    x_TD: Tensor
    token_P: Tensor  # int32, rows of x_TD
    expert_P: Tensor  # int32


class Split(NamedTuple):
    """The pieces of a dispatch, by ascending worker, and where the rows that come back belong."""

    pieces: list[Piece]
    place_TK: Ints  # the returned row of each token's experts, in expert order
    weights_TK: Floats  # in expert order


def split(x_TD: Tensor, ids_TK: Ints, weights_TK: Floats, owner_E: Ints, n_workers: int, counter_E: Ints) -> Split:
    """Cut a dispatch by worker. The rows come back ordered by (worker, expert, token); `place_TK` finds them.

    counter_E: the rows of each expert are added to it.
    """
    token_P, expert_P, place_TK, sorted_TK, first_W, row_P, first_row_W = _plan(
        ids_TK, weights_TK, owner_E, n_workers, counter_E
    )
    n_tokens = len(ids_TK)
    pieces = []
    pairs, rows = first_W.tolist(), first_row_W.tolist()
    for worker in range(n_workers):
        pair = slice(pairs[worker], pairs[worker + 1])
        if pair.start == pair.stop:
            continue
        first_row, end_row = rows[worker], rows[worker + 1]
        x = x_TD
        if end_row - first_row < n_tokens:
            x = x_TD.index_select(0, torch.from_numpy(row_P[first_row:end_row]).to(x_TD.device))
        # An array is cut faster than a tensor.
        pieces.append(Piece(worker, x, torch.from_numpy(token_P[pair]), torch.from_numpy(expert_P[pair])))
    return Split(pieces, place_TK, sorted_TK)


def piece_of(worker: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Piece:
    """One worker's part of pairs on `x_TD`, which ascend by expert: of the rows only those that are named."""
    row_R, local_P = torch.unique(token_P, return_inverse=True)
    return Piece(worker, x_TD.index_select(0, row_R.to(x_TD.device)), local_P.to(torch.int32), expert_P.contiguous())


def weighted_sum(rows_PD: Tensor, place_TK: Ints, weights_TK: Floats) -> Tensor:
    """`y[t] = sum over k of weights[t, k] * rows[place[t, k]]`, added in the order of k in float32; dtype of rows.

    `rows_PD` is used up: where it is the sum already, it is what comes back.
    """
    if rows_PD.is_cpu and rows_PD.dtype is torch.float32:
        rows = rows_PD.numpy()
        if place_TK.shape[1] == 1 and _weigh(rows, place_TK, weights_TK):
            return rows_PD
        y_TD = torch.empty(len(place_TK), rows_PD.shape[1])
        _sum(rows, place_TK, weights_TK, y_TD.numpy())
        return y_TD
    place, weights = (torch.from_numpy(array).to(rows_PD.device) for array in (place_TK, weights_TK))
    total_TD = rows_PD.index_select(0, place[:, 0]).float().mul_(weights[:, :1])
    for k in range(1, place.shape[1]):
        total_TD += rows_PD.index_select(0, place[:, k]).float().mul_(weights[:, k : k + 1])
    return total_TD.to(rows_PD.dtype)


def warm_up() -> None:
    """Compile, or load what was compiled before, so that no step waits for it."""
    ids_TK, weights_TK, owner_E = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), np.zeros(1, np.int64)
    _, place_TK, weights_TK = split(torch.ones(1, 1), ids_TK, weights_TK, owner_E, 1, np.zeros(1, np.int64))
    weighted_sum(torch.ones(1, 1), place_TK, weights_TK)
    weighted_sum(torch.ones(2, 1), np.array([[0, 1]]), np.ones((1, 2), np.float32))


def _plan_loops(ids_TK: Ints, weights_TK: Floats, owner_E: Ints, n_workers: int, counter_E: Ints) -> tuple[Any, ...]:
    n_tokens, k = ids_TK.shape
    n_experts = len(owner_E)
    next_E = np.zeros(n_experts, np.int64)
    for t in range(n_tokens):
        for i in range(k):
            next_E[ids_TK[t, i]] += 1
    counter_E += next_E
    first_W = np.zeros(n_workers + 1, np.int64)
    end = 0
    for worker in range(n_workers):
        for expert in range(n_experts):
            if owner_E[expert] == worker:
                end, next_E[expert] = end + next_E[expert], end
        first_W[worker + 1] = end

    token_P, expert_P = np.empty(n_tokens * k, np.int32), np.empty(n_tokens * k, np.int32)
    place_TK, sorted_TK = np.empty((n_tokens, k), np.int64), np.empty((n_tokens, k), np.float32)
    for t in range(n_tokens):
        for i in range(k):
            expert = ids_TK[t, i]
            at = next_E[expert]
            next_E[expert] = at + 1
            token_P[at], expert_P[at] = t, expert
            rank = 0
            for other in range(k):
                if ids_TK[t, other] < expert:
                    rank += 1
            place_TK[t, rank], sorted_TK[t, rank] = at, weights_TK[t, i]

    row_P, first_row_W = np.empty(n_tokens * k, np.int64), np.zeros(n_workers + 1, np.int64)
    row_T = np.empty(n_tokens, np.int32)
    rows = 0
    for worker in range(n_workers):
        pairs = range(first_W[worker], first_W[worker + 1])
        row_T[:] = -1
        for at in pairs:
            row_T[token_P[at]] = 0
        first = rows
        for t in range(n_tokens):
            if row_T[t] == 0:
                row_T[t] = rows - first
                row_P[rows] = t
                rows += 1
        for at in pairs:
            token_P[at] = row_T[token_P[at]]
        first_row_W[worker + 1] = rows
    return token_P, expert_P, place_TK, sorted_TK, first_W, row_P, first_row_W


def _sum_loops(rows_PD: Floats, place_TK: Ints, weights_TK: Floats, y_TD: Floats) -> None:
    for t in range(len(y_TD)):
        y, row, weight = y_TD[t], rows_PD[place_TK[t, 0]], weights_TK[t, 0]
        for d in range(len(y)):
            y[d] = weight * row[d]
        for k in range(1, place_TK.shape[1]):
            row, weight = rows_PD[place_TK[t, k]], weights_TK[t, k]
            for d in range(len(y)):
                y[d] += weight * row[d]


def _weigh_loops(rows_PD: Floats, place_TK: Ints, weights_TK: Floats) -> bool:
    """One expert a token, and the rows in the order of the tokens: weighs them where they are. False: they are not."""
    for t in range(len(place_TK)):
        if place_TK[t, 0] != t:
            return False
    for t in range(len(place_TK)):
        weight = weights_TK[t, 0]
        if weight != 1:
            row = rows_PD[t]
            for d in range(len(row)):
                row[d] *= weight
    return True


_plan = cast(Callable[[Ints, Floats, Ints, int, Ints], tuple[Any, ...]], numba.njit(cache=True)(_plan_loops))
_sum = cast(Callable[[Floats, Ints, Floats, Floats], None], numba.njit(cache=True)(_sum_loops))
_weigh = cast(Callable[[Floats, Ints, Floats], bool], numba.njit(cache=True)(_weigh_loops))
