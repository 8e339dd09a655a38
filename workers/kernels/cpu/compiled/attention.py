"""The CPU kernel of attention over paged keys and values.

Every query row is summed in one order, over its keys from the first one on: the same bits in a prompt, in any part of
one, and when it decodes. Rows of a prompt only share what is read. Imported only to build it (see `library`): numba is
here.
"""

from __future__ import annotations

import numba
from numba import float32

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_float32, as_int32, as_int64, exp, reader, take
from workers.kernels.cpu.compiled.rows import dots
from workers.kernels.cpu.compiled.values import add_values
from workers.kernels.cpu.kernel import FLOAT32

_attention = reader(arguments.Attention)


@numba.njit(fastmath=True)
def _largest(row, n):  # type: ignore[no-untyped-def]
    best = row[0]
    for i in range(n):
        best = max(best, row[i])
    return best


@numba.njit(fastmath=True)
def _sum(row, n):  # type: ignore[no-untyped-def]
    total = float32(0.0)
    for i in range(n):
        total += row[i]
    return total


@numba.njit
def _softmax(row, n, scale):  # type: ignore[no-untyped-def]
    """row = exp(scale * (row - its maximum)), divided by its sum."""
    top = _largest(row, n)
    for i in range(n):
        row[i] = exp((row[i] - top) * scale)
    part = float32(1.0) / _sum(row, n)
    for i in range(n):
        row[i] *= part


@numba.njit
def _block(a, pool, table, g, j):  # type: ignore[no-untyped-def]
    """Where key or value j of a sequence lies, of a key/value head."""
    row = table[j // a.block_size] * a.block_size + j % a.block_size
    return pool + 4 * (row * a.n_kv + g) * a.head


@numba.njit
def _rows(a, t, end, g, mine):  # type: ignore[no-untyped-def]
    """Attention of one key/value head for the rows t:end of a sequence: their queries share what is read."""
    group, row_bytes, size = a.n_heads // a.n_kv, 4 * a.n_kv * a.head, a.block_size
    n_queries, position = group * (end - t), as_int64(a.position)
    table = as_int32(a.tables + as_int64(a.sequence)[t] * a.table_stride)
    queries, outs = as_int64(mine), as_int64(mine + 8 * n_queries)
    scores = mine + 16 * n_queries
    for i in range(n_queries):
        at = 4 * ((t + i // group) * a.n_heads + g * group + i % group) * a.head
        queries[i], outs[i] = a.q + at, a.out + at
        row = as_float32(a.out + at)
        for d in range(a.head):
            row[d] = 0.0
    begin, last = max(0, position[t] + 1 - a.window), position[end - 1] + 1
    j = begin
    while j < last:
        n, out = min(size - j % size, last - j), scores + 4 * (j - begin)
        dots(FLOAT32, _block(a, a.keys, table, g, j), row_bytes, 0, n, mine, n_queries, a.head, out, a.score_stride)
        j += n
    for i in range(n_queries):
        seen = position[t + i // group] + 1
        first = max(0, seen - a.window)
        _softmax(as_float32(scores + i * a.score_stride + 4 * (first - begin)), seen - first, a.scale)
    # Keys that all rows see are taken for all of them together; those before and after, by each row that sees them.
    shared, all_see = max(begin, last - a.window), position[t] + 1
    j = begin
    while j < last:
        n = min(size - j % size, last - j)
        if j < shared:
            n = min(n, shared - j)
        elif j < all_see:
            n = min(n, all_see - j)
        block, weights = _block(a, a.values, table, g, j), scores + 4 * (j - begin)
        if shared <= j < all_see:
            add_values(mine + 8 * n_queries, n_queries, weights, a.score_stride, block, row_bytes, n, a.head)
        else:
            for row in range(t, end):
                i, seen = group * (row - t), position[row] + 1
                skipped = max(0, seen - a.window - j)
                add_values(
                    mine + 8 * (n_queries + i), group, weights + i * a.score_stride + 4 * skipped, a.score_stride,
                    block + skipped * row_bytes, row_bytes, min(j + n, seen) - j - skipped, a.head,
                )  # fmt: skip
        j += n


def attention(args: int) -> None:
    """out[T, H, d]: every thread takes one (block of rows, key/value head) at a time; scores are in its own scratch."""
    a = _attention(args)
    mine, sequence = a.scratch + a.scratch_stride * take(args + 16), as_int64(a.sequence)
    u = take(args)
    while u < (a.n_rows + a.rows - 1) // a.rows * a.n_kv:
        t, g = u // a.n_kv * a.rows, u % a.n_kv
        last = min(a.n_rows, t + a.rows)
        while t < last:
            end = t + 1
            while end < last and sequence[end] == sequence[t]:
                end += 1
            _rows(a, t, end, g, mine)
            t = end
        u = take(args)


KERNELS = (attention,)
