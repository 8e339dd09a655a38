"""The CPU kernels of products: of the dense half, and of all experts of a layer at once.

Weights are float32, bfloat16 or float16, rows and sums float32. Imported only to build them (see `native`): numba is
here.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu_few import few_dots, few_swiglu
from workers.kernels.cpu_many import many_dots, many_swiglu
from workers.kernels.jit import as_float32, as_int64, take, wait_for_team
from workers.kernels.native import DOWN_UNIT, FEW_ROWS, FLOAT32, UNIT


def linear(args: int) -> None:
    """y[T, N] = x[T, K] @ weight[N, K].T; every thread has the rows' addresses and a panel in scratch of its own."""
    a = as_int64(args)
    x, x_stride, weight, y, n_rows, k, n, scratch, kind = a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12]
    stride = (4 if kind == FLOAT32 else 2) * k
    me = take(args + 16)
    token_rows, panel = scratch + 8 * n_rows * me, a[13] + a[14] * me
    rows = as_int64(token_rows)
    for t in range(n_rows):
        rows[t] = x + t * x_stride
    first = UNIT * take(args)
    while first < n:
        last = min(n, first + UNIT)
        if n_rows <= FEW_ROWS:
            few_dots(kind, weight, stride, first, last, token_rows, n_rows, k, y + 4 * first, 4 * n)
        else:
            many_dots(kind, weight, stride, first, last, token_rows, n_rows, k, y + 4 * first, 4 * n, panel)
        first = UNIT * take(args)


def plan(args: int) -> None:
    """Sort the pairs by expert, keeping their order within one, and note where each expert's begin.

    Fills `starts` [E + 1], then per sorted pair its number, the address of its token row and that of its hidden row;
    adds the rows to `counters` [E]; `result` becomes (most rows of an expert, rows of experts without weights).
    """
    a = as_int64(args)
    experts, n_pairs, n_experts, table = as_int64(a[4]), a[5], a[6], as_int64(a[7])
    counters, token, choices, x, x_stride = as_int64(a[8]), a[9], a[10], a[11], a[12]
    hidden, hidden_stride, result = a[13], a[14], as_int64(a[15])
    starts, order = as_int64(a[16]), as_int64(a[17])
    token_rows, hidden_rows = as_int64(a[18]), as_int64(a[19])
    for e in range(n_experts + 1):
        starts[e] = 0
    for p in range(n_pairs):
        starts[experts[p]] += 1
    end, most, missing = 0, 0, 0
    for e in range(n_experts):
        count = starts[e]
        most = max(most, count)
        if table[2 * e] == 0:
            missing += count
        else:
            counters[e] += count
        end += count
        starts[e] = end
    starts[n_experts] = end
    for p in range(n_pairs - 1, -1, -1):
        e = experts[p]
        starts[e] -= 1
        at = starts[e]
        order[at] = p
        row = p // choices if token == 0 else as_int64(token)[p]
        token_rows[at] = x + row * x_stride
        hidden_rows[at] = hidden + at * hidden_stride
    result[0] = most
    result[1] = missing


@numba.njit(inline="never")
def hidden_phase(args, panel):  # type: ignore[no-untyped-def]
    """hidden[pair, F] = silu(w1 x) * (w3 x) of every expert with at most `limit` pairs, shared out by blocks of F."""
    a = as_int64(args)
    d, f, n_experts, limit = a[4], a[5], a[6], a[7]
    table, starts, token_rows, hidden, kind = as_int64(a[8]), as_int64(a[9]), a[10], a[12], a[14]
    hidden_stride = a[15]
    stride = (4 if kind == FLOAT32 else 2) * d
    blocks = (f + UNIT - 1) // UNIT
    u = take(args)
    while u < n_experts * blocks:
        e, first = u // blocks, UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        if 0 < count <= limit:
            gate, tokens = table[2 * e], token_rows + 8 * begin
            out = hidden + begin * hidden_stride + 4 * first
            up, last = gate + f * stride, min(f, first + UNIT)
            if count <= FEW_ROWS:
                few_swiglu(kind, gate, up, stride, first, last, tokens, count, d, out, hidden_stride)
            else:
                many_swiglu(kind, gate, up, stride, first, last, tokens, count, d, out, hidden_stride, panel)
        u = take(args)


@numba.njit(inline="never")
def down_phase(args, panel):  # type: ignore[no-untyped-def]
    """y[pair, D] = w2 hidden[pair] of every expert with at most `limit` pairs, shared out by blocks of D."""
    a = as_int64(args)
    d, f, n_experts, limit = a[4], a[5], a[6], a[7]
    table, starts, hidden_rows, y, kind = as_int64(a[8]), as_int64(a[9]), a[11], a[13], a[14]
    stride = (4 if kind == FLOAT32 else 2) * f
    blocks = (d + UNIT - 1) // UNIT
    u = take(args + 8)
    while u < n_experts * blocks:
        e, first = u // blocks, UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        if 0 < count <= limit:
            rows, out, last = hidden_rows + 8 * begin, y + 4 * (begin * d + first), min(d, first + UNIT)
            if count <= FEW_ROWS:
                few_dots(kind, table[2 * e + 1], stride, first, last, rows, count, f, out, 4 * d)
            else:
                many_dots(kind, table[2 * e + 1], stride, first, last, rows, count, f, out, 4 * d, panel)
        u = take(args + 8)


def experts_pairs(args: int) -> None:
    """y[pair, D] of every expert with at most `limit` pairs, unweighted, pairs sorted by expert.

    Every thread has a panel of its own, which an expert with more than FEW_ROWS pairs needs.
    """
    a = as_int64(args)
    panel = a[16] + a[17] * take(args + 16)
    hidden_phase(args, panel)
    wait_for_team(a[3])
    down_phase(args, panel)


@numba.njit(inline="never")
def add_weighted(y, y_stride, begin, end, order, choices, weights, out, d, first, last):  # type: ignore[no-untyped-def]
    """out[token of pair, first:last] += weight of pair * y[pair - begin], pair after pair."""
    for at in range(begin, end):
        pair = as_int64(order)[at]
        row = as_float32(y + (at - begin) * y_stride)
        target = as_float32(out + 4 * (pair // choices * d + first))
        weight = as_float32(weights)[pair]
        for i in range(last - first):
            target[i] += weight * row[i]


def experts_combined(args: int) -> None:
    """out[T, D] = the weighted sum over each token's experts, added in expert order; at most FEW_ROWS pairs each."""
    a = as_int64(args)
    d, f, n_experts = a[4], a[5], a[6]
    table, starts, hidden_rows, out, kind, order = as_int64(a[8]), as_int64(a[9]), a[11], a[13], a[14], a[16]
    weights, choices, n_pairs, buffers, buffer_stride = a[17], a[18], a[19], a[20], a[21]
    stride = (4 if kind == FLOAT32 else 2) * f
    hidden_phase(args, 0)
    wait_for_team(a[3])
    blocks = (d + DOWN_UNIT - 1) // DOWN_UNIT
    buffer = buffers + buffer_stride * take(args + 16)  # one of its own for each thread
    u = take(args + 8)
    while u < blocks:
        first, last = DOWN_UNIT * u, min(d, DOWN_UNIT * u + DOWN_UNIT)
        for t in range(n_pairs // choices):
            target = as_float32(out + 4 * (t * d + first))
            for i in range(last - first):
                target[i] = 0.0
        for e in range(n_experts):
            begin, end = starts[e], starts[e + 1]
            if begin < end:
                rows = hidden_rows + 8 * begin
                few_dots(kind, table[2 * e + 1], stride, first, last, rows, end - begin, f, buffer, 4 * DOWN_UNIT)
                add_weighted(buffer, 4 * DOWN_UNIT, begin, end, order, choices, weights, out, d, first, last)
        u = take(args + 8)


def combine(args: int) -> None:
    """out[T, D] += weight of pair * y[pair], pair after pair; threads share out the columns."""
    a = as_int64(args)
    y, d, n_pairs, token, weights, out = a[4], a[5], a[6], as_int64(a[7]), as_float32(a[8]), a[9]
    u = take(args)
    while UNIT * u < d:
        first, last = UNIT * u, min(d, UNIT * u + UNIT)
        for pair in range(n_pairs):
            row = as_float32(y + 4 * (pair * d + first))
            target = as_float32(out + 4 * (token[pair] * d + first))
            for i in range(last - first):
                target[i] += weights[pair] * row[i]
        u = take(args)


KERNELS = (linear, plan, experts_pairs, experts_combined, combine)
