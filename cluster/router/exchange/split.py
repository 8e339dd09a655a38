"""A dispatch cut into one part per worker.

Legend: T token rows, K experts a token, P pairs, D hidden size, E experts, W workers, R rows sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from workers import wire
from workers.kernels.dispatch import Ints, Plan
from workers.kernels.message import FEW_ROWS
from workers.kernels.ops import Ops
from workers.transport.base import Rows, Tag
from workers.wire import FRAME_BYTES

NewTag = Callable[[], Tag]
Room = Callable[[int, int], memoryview | None]


def split(
    ops: Ops,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    owner_E: Ints,
    n_workers: int,
    counter_E: Ints,
    new_tag: NewTag,
    room: Room = lambda worker, n_bytes: None,
) -> tuple[Iterator[tuple[int, Rows]], Plan]:
    """Cut a dispatch by worker: (worker, its rows) by ascending worker, and the plan that `weighted_sum` adds up by.

    Rows are cut when they are asked for, so that those before are on their way. They come back ordered by (worker,
    expert, token). ids_TK (int64, distinct within a row) and weights_TK (float32) are on the host. counter_E: the rows
    of each expert are added to it. new_tag: gives each worker's rows theirs. room: where a worker's request wants to
    lie; a small one is laid out in any case.
    """
    plan = ops.dispatch_plan(ids_TK, weights_TK, owner_E, n_workers, counter_E)
    return _cut(ops, x_TD, plan, new_tag, room), plan


def rows_of(tag: Tag, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Rows:
    """One worker's part of pairs on `x_TD`, which ascend by expert: of the rows only those that are named."""
    row_R, local_P = torch.unique(token_P, return_inverse=True)
    return Rows(tag, x_TD.index_select(0, row_R.to(x_TD.device)), local_P.to(torch.int32), expert_P.contiguous())


def _cut(ops: Ops, x_TD: Tensor, plan: Plan, new_tag: NewTag, room: Room) -> Iterator[tuple[int, Rows]]:
    first_W, first_row_W = plan.cuts()
    asked = [worker for worker in range(plan.n_workers) if first_W[worker] < first_W[worker + 1]]
    width, dtype = x_TD.shape[1], x_TD.dtype
    for worker in asked:
        pair = slice(first_W[worker], first_W[worker + 1])
        row = slice(first_row_W[worker], first_row_W[worker + 1])
        n_rows, n_pairs = row.stop - row.start, pair.stop - pair.start
        n_bytes = wire.request_bytes(n_rows, n_pairs, width, dtype)
        message = room(worker, n_bytes)
        if message is None and n_rows <= FEW_ROWS and n_bytes <= FRAME_BYTES:
            message = memoryview(bytearray(n_bytes))
        if message is not None:
            ops.pack_request(plan, x_TD, row, pair, message)
            rows = Rows.packed(new_tag(), message, n_rows, n_pairs, width, dtype)
        else:
            rows = _in_tensors(x_TD, plan, row, pair, new_tag())
        rows.asked = len(asked)
        yield worker, rows


def _in_tensors(x_TD: Tensor, plan: Plan, row: slice, pair: slice, tag: Tag) -> Rows:
    if row.stop - row.start < plan.n_tokens:
        x_TD = x_TD.index_select(0, torch.from_numpy(plan.row_P[row]).to(x_TD.device))
    token_P, expert_P = plan.pairs
    # An array is cut faster than a tensor.
    return Rows(tag, x_TD, torch.from_numpy(token_P[pair]), torch.from_numpy(expert_P[pair]))
