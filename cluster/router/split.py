"""A dispatch cut into one part per worker, and the parts put together again.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, E experts, W workers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """What one worker computes: token rows, each there once, and the pairs on them, ascending by expert."""

    worker: int
    x_TD: Tensor
    token_P: Tensor  # int32, rows of x_TD
    expert_P: Tensor  # int32


class Split(NamedTuple):
    """The pieces of a dispatch, by ascending worker, and where the rows that come back belong."""

    pieces: list[Piece]
    place_TK: Tensor  # int64: the returned row of each token's experts, in expert order
    weights_TK: Tensor  # float32, in expert order


def split(x_TD: Tensor, ids_TK: Ints, weights_TK: Tensor, owner_E: Ints) -> Split:
    """Cut a dispatch by worker. The rows come back ordered by (worker, expert, token); `place_TK` finds them."""
    n_tokens, k = ids_TK.shape
    ids_P = ids_TK.ravel()
    owner_P = owner_E[ids_P]
    order_P = (owner_P * len(owner_E) + ids_P).argsort(kind="stable")
    place_P = np.empty_like(order_P)
    place_P[order_P] = np.arange(n_tokens * k)
    # Within a token the gate names the best expert first; the sum goes by expert.
    by_expert_TK = ids_TK.argsort(axis=1) + np.arange(0, n_tokens * k, k)[:, None]
    pieces = []
    first = 0
    for worker, count in enumerate(np.bincount(owner_P).tolist()):
        if count:
            pairs_P = order_P[first : first + count]
            pieces.append(piece_of(worker, x_TD, pairs_P // k, ids_P[pairs_P]))
            first += count
    flat_TK = torch.from_numpy(by_expert_TK)
    return Split(pieces, torch.from_numpy(place_P[by_expert_TK]), weights_TK.flatten()[flat_TK.to(weights_TK.device)])


def piece_of(worker: int, x_TD: Tensor, token_P: NDArray[Any], expert_P: NDArray[Any]) -> Piece:
    """One worker's part: of the rows x_TD only those that `token_P` names, each once."""
    named_T = np.zeros(len(x_TD), np.bool_)
    named_T[token_P] = True
    if not named_T.all():
        x_TD = x_TD.index_select(0, torch.from_numpy(named_T.nonzero()[0]).to(x_TD.device))
        token_P = (named_T.cumsum() - 1)[token_P]
    tokens, experts = token_P.astype(np.int32), expert_P.astype(np.int32)
    return Piece(worker, x_TD, torch.from_numpy(tokens), torch.from_numpy(experts))


def weighted_sum(rows_PD: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`y[t] = sum over k of weights[t, k] * rows[place[t, k]]`, added in the order of k in float32; dtype of rows."""
    place_TK = place_TK.to(rows_PD.device)
    y_TD = rows_PD.index_select(0, place_TK[:, 0]).float().mul_(weights_TK[:, :1])
    for k in range(1, place_TK.shape[1]):
        y_TD += rows_PD.index_select(0, place_TK[:, k]).float().mul_(weights_TK[:, k : k + 1])
    return y_TD.to(rows_PD.dtype)
