"""The CPU kernels for few rows: they stream the weights once, at the speed of the memory.

Imported only to build them (see `native`): numba is here.
"""

from __future__ import annotations

import numba

from workers.kernels.jit import as_float32, as_int64, take, wait_for_team
from workers.kernels.native import DOWN_UNIT, UNIT
from workers.kernels.tile import COLUMNS, dot_tile, swiglu_tile

_dot_1, _dot_2, _dot_3, _dot_4, _dot_5, _dot_6 = (dot_tile(4, columns) for columns in range(1, 7))
_dot_single = dot_tile(1, 1)
_swiglu_1, _swiglu_2, _swiglu_3, _swiglu_4, _swiglu_5, _swiglu_6 = (swiglu_tile(2, columns) for columns in range(1, 7))
_swiglu_single = swiglu_tile(1, 1)


@numba.njit(inline="never")
def dot_rows(weight, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = dot(weight row n, token row t)` for the weight rows first:last."""
    n = first
    while n + 4 <= last:
        w = weight + n * stride
        o = out + 4 * (n - first)
        t = 0
        while t < n_rows:
            chunks = (n_rows - t + COLUMNS - 1) // COLUMNS
            c = (n_rows - t + chunks - 1) // chunks
            tokens = token_rows + 8 * t
            y = o + t * out_stride
            ahead = 4 * stride
            if c == 1:
                _dot_1(w, stride, tokens, k, y, out_stride, ahead)
            elif c == 2:
                _dot_2(w, stride, tokens, k, y, out_stride, ahead)
            elif c == 3:
                _dot_3(w, stride, tokens, k, y, out_stride, ahead)
            elif c == 4:
                _dot_4(w, stride, tokens, k, y, out_stride, ahead)
            elif c == 5:
                _dot_5(w, stride, tokens, k, y, out_stride, ahead)
            else:
                _dot_6(w, stride, tokens, k, y, out_stride, ahead)
            t += c
        n += 4
    while n < last:
        for t in range(n_rows):
            y = out + 4 * (n - first) + t * out_stride
            _dot_single(weight + n * stride, stride, token_rows + 8 * t, k, y, out_stride, 0)
        n += 1


def linear(args: int) -> None:
    """y[T, N] = x[T, K] @ weight[N, K].T; every thread keeps the rows' addresses in its own part of the scratch."""
    a = as_int64(args)
    x, x_stride, weight, y, n_rows, k, n, scratch = a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]
    token_rows = scratch + 8 * n_rows * take(args + 16)
    rows = as_int64(token_rows)
    for t in range(n_rows):
        rows[t] = x + t * x_stride
    first = UNIT * take(args)
    while first < n:
        dot_rows(weight, 4 * k, first, min(n, first + UNIT), token_rows, n_rows, k, y + 4 * first, 4 * n)
        first = UNIT * take(args)


@numba.njit(inline="never")
def swiglu_rows(gate, up, stride, first, last, token_rows, n_rows, k, out, out_stride):  # type: ignore[no-untyped-def]
    """`out[t, n - first] = silu(gate row n . token row t) * (up row n . token row t)` for the rows first:last."""
    n = first
    while n + 2 <= last:
        g, u = gate + n * stride, up + n * stride
        o = out + 4 * (n - first)
        t = 0
        while t < n_rows:
            chunks = (n_rows - t + COLUMNS - 1) // COLUMNS
            c = (n_rows - t + chunks - 1) // chunks
            tokens = token_rows + 8 * t
            y = o + t * out_stride
            ahead = 2 * stride
            if c == 1:
                _swiglu_1(g, u, stride, tokens, k, y, out_stride, ahead)
            elif c == 2:
                _swiglu_2(g, u, stride, tokens, k, y, out_stride, ahead)
            elif c == 3:
                _swiglu_3(g, u, stride, tokens, k, y, out_stride, ahead)
            elif c == 4:
                _swiglu_4(g, u, stride, tokens, k, y, out_stride, ahead)
            elif c == 5:
                _swiglu_5(g, u, stride, tokens, k, y, out_stride, ahead)
            else:
                _swiglu_6(g, u, stride, tokens, k, y, out_stride, ahead)
            t += c
        n += 2
    if n < last:
        for t in range(n_rows):
            y = out + 4 * (n - first) + t * out_stride
            _swiglu_single(gate + n * stride, up + n * stride, stride, token_rows + 8 * t, k, y, out_stride, 0)


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
def hidden_phase(args):  # type: ignore[no-untyped-def]
    """hidden[pair, F] = silu(w1 x) * (w3 x) of every expert with at most `limit` pairs, shared out by blocks of F."""
    a = as_int64(args)
    d, f, n_experts, limit = a[4], a[5], a[6], a[7]
    table, starts, token_rows, hidden = as_int64(a[8]), as_int64(a[9]), a[10], a[12]
    blocks = (f + UNIT - 1) // UNIT
    u = take(args)
    while u < n_experts * blocks:
        e, first = u // blocks, UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        if 0 < count <= limit:
            gate, tokens = table[2 * e], token_rows + 8 * begin
            out = hidden + 4 * (begin * f + first)
            swiglu_rows(gate, gate + 4 * f * d, 4 * d, first, min(f, first + UNIT), tokens, count, d, out, 4 * f)
        u = take(args)


def experts_pairs(args: int) -> None:
    """y[pair, D] of every expert with at most `limit` pairs, unweighted, pairs sorted by expert."""
    a = as_int64(args)
    d, f, n_experts, limit = a[4], a[5], a[6], a[7]
    table, starts, hidden_rows, y = as_int64(a[8]), as_int64(a[9]), a[11], a[13]
    hidden_phase(args)
    wait_for_team(a[3])
    blocks = (d + UNIT - 1) // UNIT
    u = take(args + 8)
    while u < n_experts * blocks:
        e, first = u // blocks, UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        if 0 < count <= limit:
            rows, out = hidden_rows + 8 * begin, y + 4 * (begin * d + first)
            dot_rows(table[2 * e + 1], 4 * f, first, min(d, first + UNIT), rows, count, f, out, 4 * d)
        u = take(args + 8)


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
    """out[T, D] = the weighted sum over each token's experts, added in expert order."""
    a = as_int64(args)
    d, f, n_experts = a[4], a[5], a[6]
    table, starts, hidden_rows, order = as_int64(a[8]), as_int64(a[9]), a[11], a[14]
    out, weights, choices, n_pairs, buffers, buffer_stride = a[13], a[15], a[16], a[17], a[18], a[19]
    hidden_phase(args)
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
                dot_rows(table[2 * e + 1], 4 * f, first, last, rows, end - begin, f, buffer, 4 * DOWN_UNIT)
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
