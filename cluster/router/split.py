"""A dispatch cut into one part per worker.

Legend: T token rows, K experts a token, P pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from workers.kernels.dispatch import Ints, Plan
from workers.kernels.message import FEW_ROWS
from workers.kernels.ops import Ops
from workers.transport.base import Rows, Tag
from workers.wire import FRAME_BYTES

NewTag = Callable[[], Tag]


def split(
    ops: Ops,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    owner_E: Ints,
    n_workers: int,
    counter_E: Ints,
    new_tag: NewTag,
) -> tuple[Iterator[tuple[int, Rows]], Plan]:
    """Cut a dispatch by worker: (worker, its rows) by ascending worker, and the plan that `weighted_sum` adds up by.

    Rows are cut when they are asked for, so that those before are on their way. They come back ordered by (worker,
    expert, token). ids_TK (int64, distinct within a row) and weights_TK (float32) are on the host. counter_E: the rows
    of each expert are added to it. new_tag: gives each worker's rows theirs.
    """
    few = len(x_TD) <= FEW_ROWS and x_TD.nbytes <= FRAME_BYTES // 2
    made = ops.dispatch_plan(ids_TK, weights_TK, owner_E, n_workers, counter_E, x_TD if few else None)
    return (_packed(x_TD.shape[1], made, new_tag) if made.is_packed else _cut(x_TD, made, new_tag)), made


def rows_of(tag: Tag, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Rows:
    """One worker's part of pairs on `x_TD`, which ascend by expert: of the rows only those that are named."""
    row_R, local_P = torch.unique(token_P, return_inverse=True)
    return Rows(tag, x_TD.index_select(0, row_R.to(x_TD.device)), local_P.to(torch.int32), expert_P.contiguous())


def _packed(width: int, made: Plan, new_tag: NewTag) -> Iterator[tuple[int, Rows]]:
    """The rows of a few tokens, which the plan has laid out as requests."""
    first_W, first_row_W, first_byte_W = made.cuts()
    messages = made.messages
    for worker in range(made.n_workers):
        n_pairs = first_W[worker + 1] - first_W[worker]
        if n_pairs:
            n_rows, begin = first_row_W[worker + 1] - first_row_W[worker], first_byte_W[worker]
            message = messages[begin : begin + made.message_bytes(n_rows, n_pairs)]
            yield worker, Rows.packed(new_tag(), message, n_rows, n_pairs, width)


def _cut(x_TD: Tensor, made: Plan, new_tag: NewTag) -> Iterator[tuple[int, Rows]]:
    first_W, first_row_W, _ = made.cuts()
    token_P, expert_P = made.pairs
    for worker in range(made.n_workers):
        pair = slice(first_W[worker], first_W[worker + 1])
        if pair.start == pair.stop:
            continue
        x, row = x_TD, slice(first_row_W[worker], first_row_W[worker + 1])
        if row.stop - row.start < made.n_tokens:
            x = x_TD.index_select(0, torch.from_numpy(made.row_P[row]).to(x_TD.device))
        # An array is cut faster than a tensor.
        yield worker, Rows(new_tag(), x, torch.from_numpy(token_P[pair]), torch.from_numpy(expert_P[pair]))
