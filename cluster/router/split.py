"""A dispatch cut into one part per worker.

Legend: T token rows, K experts a token, P pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from workers.kernels.dispatch import Ints, Plan, plan


class Piece(NamedTuple):
    """What one worker computes: token rows, each there once, and the pairs on them, ascending by expert."""

    worker: int
    x_TD: Tensor
    token_P: Tensor  # int32, rows of x_TD
    expert_P: Tensor  # int32


def split(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, owner_E: Ints, n_workers: int, counter_E: Ints
) -> tuple[Iterator[Piece], Plan]:
    """Cut a dispatch by worker: the pieces by ascending worker, and the plan that `weighted_sum` adds up by.

    A piece is cut when it is asked for, so that the one before is on its way. The rows come back ordered by (worker, expert, token). ids_TK (int64, distinct within a row) and weights_TK
    (float32) are on the host. counter_E: the rows of each expert are added to it.
    """
    made = plan(ids_TK, weights_TK, owner_E, n_workers, counter_E)
    return _pieces(x_TD, made), made


def _pieces(x_TD: Tensor, made: Plan) -> Iterator[Piece]:
    first_W, first_row_W = made.cuts()
    token_P, expert_P = made.pairs
    for worker in range(made.n_workers):
        pair = slice(first_W[worker], first_W[worker + 1])
        if pair.start == pair.stop:
            continue
        x, row = x_TD, slice(first_row_W[worker], first_row_W[worker + 1])
        if row.stop - row.start < made.n_tokens:
            x = x_TD.index_select(0, torch.from_numpy(made.row_P[row]).to(x_TD.device))
        # An array is cut faster than a tensor.
        yield Piece(worker, x, torch.from_numpy(token_P[pair]), torch.from_numpy(expert_P[pair]))


def piece_of(worker: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Piece:
    """One worker's part of pairs on `x_TD`, which ascend by expert: of the rows only those that are named."""
    row_R, local_P = torch.unique(token_P, return_inverse=True)
    return Piece(worker, x_TD.index_select(0, row_R.to(x_TD.device)), local_P.to(torch.int32), expert_P.contiguous())
