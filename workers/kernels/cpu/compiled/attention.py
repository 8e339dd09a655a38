"""The CPU kernel of attention over paged keys and values.

Every query row is computed alone and in one order, over its keys from the first one on: the same bits in a prompt, in
any part of one, and when it decodes. Imported only to build it (see `library`): numba is here.
"""

from __future__ import annotations

import numba
from numba import float32

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_float32, as_int32, as_int64, exp, reader, take
from workers.kernels.cpu.compiled.rows import dots
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
    """row = exp(scale * (row - its maximum)), not yet divided by its sum, which is returned."""
    top = _largest(row, n)
    for i in range(n):
        row[i] = exp((row[i] - top) * scale)
    return _sum(row, n)


@numba.njit
def _add_values(out, p, values, stride, n, head):  # type: ignore[no-untyped-def]
    """out[d] += sum over n keys of p[key] * value[key, d], four keys at a time."""
    j = 0
    while j + 4 <= n:
        at = values + j * stride
        v0, v1 = as_float32(at), as_float32(at + stride)
        v2, v3 = as_float32(at + 2 * stride), as_float32(at + 3 * stride)
        p0, p1, p2, p3 = p[j], p[j + 1], p[j + 2], p[j + 3]
        for i in range(head):
            out[i] += (p0 * v0[i] + p1 * v1[i]) + (p2 * v2[i] + p3 * v3[i])
        j += 4
    while j < n:
        v = as_float32(values + j * stride)
        for i in range(head):
            out[i] += p[j] * v[i]
        j += 1


def attention(args: int) -> None:
    """out[T, H, d]: every thread takes one (query row, key/value head) at a time, with scores in its own scratch."""
    a = _attention(args)
    size, head = a.block_size, a.head
    group, row_bytes = a.n_heads // a.n_kv, 4 * a.n_kv * head
    mine = a.scratch + a.scratch_stride * take(args + 16)
    queries, scores = as_int64(mine), mine + 8 * group
    u = take(args)
    while u < a.n_rows * a.n_kv:
        t, g = u // a.n_kv, u % a.n_kv
        table = as_int32(a.tables + as_int64(a.sequence)[t] * a.table_stride)
        last = as_int64(a.position)[t] + 1
        first = max(0, last - a.window)
        at = 4 * (t * a.n_heads + g * group) * head
        for h in range(group):
            queries[h] = a.q + at + 4 * h * head
            row = as_float32(a.out + at + 4 * h * head)
            for i in range(head):
                row[i] = 0.0
        j = first
        while j < last:
            n = min(size - j % size, last - j)
            block = a.keys + (table[j // size] * size + j % size) * row_bytes + 4 * g * head
            dots(FLOAT32, block, 0, row_bytes, 0, n, mine, group, head, scores + 4 * (j - first), a.score_stride)
            j += n
        for h in range(group):
            p, row = as_float32(scores + h * a.score_stride), as_float32(a.out + at + 4 * h * head)
            total = _softmax(p, last - first, a.scale)
            j = first
            while j < last:
                n = min(size - j % size, last - j)
                block = a.values + (table[j // size] * size + j % size) * row_bytes + 4 * g * head
                weights = as_float32(scores + h * a.score_stride + 4 * (j - first))
                _add_values(row, weights, block, row_bytes, n, head)
                j += n
            for i in range(head):
                row[i] /= total
        u = take(args)


KERNELS = (attention,)
