"""The CPU kernels of the dense half: norms, rotary embedding with the cache write, paged attention, the gate's choice.

Imported only to build them (see `native`): numba is here.
"""

from __future__ import annotations

import numba
from numba import float32, int32

from workers.kernels.cpu_few import dot_rows
from workers.kernels.jit import as_float32, as_int32, as_int64, bits_as_float32, call, floor, sqrt, take, wait_for_team

#: Rows of a norm that one thread takes at a time.
NORM_ROWS = 4


@numba.njit(fastmath=True)
def _square_sum(row, d):  # type: ignore[no-untyped-def]
    total = float32(0.0)
    for i in range(d):
        total += row[i] * row[i]
    return total


@numba.njit
def _norm(row, weight, out, d, eps):  # type: ignore[no-untyped-def]
    scale = float32(1.0) / sqrt(_square_sum(row, d) / float32(d) + eps)
    for i in range(d):
        out[i] = weight[i] * (row[i] * scale)


def rms_norm(args: int) -> None:
    """y[T, D] = x / rms(x) * weight."""
    a = as_int64(args)
    x, x_stride, weight, y, n_rows, d, eps = a[4], a[5], as_float32(a[6]), a[7], a[8], a[9], bits_as_float32(a[10])
    first = NORM_ROWS * take(args)
    while first < n_rows:
        for t in range(first, min(first + NORM_ROWS, n_rows)):
            _norm(as_float32(x + t * x_stride), weight, as_float32(y + 4 * t * d), d, eps)
        first = NORM_ROWS * take(args)


def add_rms_norm(args: int) -> None:
    """residual[T, D] += delta; y = the norm of it."""
    a = as_int64(args)
    residual, stride, delta, delta_stride, weight = a[4], a[5], a[6], a[7], as_float32(a[8])
    y, n_rows, d, eps = a[9], a[10], a[11], bits_as_float32(a[12])
    first = NORM_ROWS * take(args)
    while first < n_rows:
        for t in range(first, min(first + NORM_ROWS, n_rows)):
            row, more = as_float32(residual + t * stride), as_float32(delta + t * delta_stride)
            for i in range(d):
                row[i] += more[i]
            _norm(row, weight, as_float32(y + 4 * t * d), d, eps)
        first = NORM_ROWS * take(args)


@numba.njit
def _exp(x):  # type: ignore[no-untyped-def]
    """exp(x) for x <= 0, within 2 ulp, in operations that a compiler makes vectors of."""
    x = max(x, float32(-87.0))
    power = floor(x * float32(1.4426950216293335) + float32(0.5))
    rest = x - power * float32(0.693359375) + power * float32(2.12194442e-4)
    value = float32(1 / 5040)
    value = value * rest + float32(1 / 720)
    value = value * rest + float32(1 / 120)
    value = value * rest + float32(1 / 24)
    value = value * rest + float32(1 / 6)
    value = value * rest + float32(1 / 2)
    value = value * rest + float32(1.0)
    value = value * rest + float32(1.0)
    return value * bits_as_float32((int32(power) + int32(127)) << int32(23))


def gate_top_k(args: int) -> None:
    """ids[T, K], weights[T, K]: the best logits of each row, best first, and the softmax over them."""
    a = as_int64(args)
    logits, stride, ids, weights, n_rows, n_experts, k = a[4], a[5], as_int64(a[6]), as_float32(a[7]), a[8], a[9], a[10]
    for t in range(n_rows):
        row = as_float32(logits + t * stride)
        for choice in range(k):
            best = -1
            for e in range(n_experts):
                taken = False
                for earlier in range(choice):
                    taken |= ids[t * k + earlier] == e
                if not taken and (best < 0 or row[e] > row[best]):
                    best = e
            ids[t * k + choice] = best
        total = float32(0.0)
        top = row[ids[t * k]]
        for choice in range(k):
            weight = _exp(row[ids[t * k + choice]] - top)
            weights[t * k + choice] = weight
            total += weight
        for choice in range(k):
            weights[t * k + choice] /= total


@numba.njit
def _rotate(x, out, cos, sin, head):  # type: ignore[no-untyped-def]
    half = head // 2
    for i in range(half):
        one, two = x[i], x[half + i]
        out[i] = one * cos[i] - two * sin[i]
        out[half + i] = two * cos[half + i] + one * sin[half + i]


def rotary_write(args: int) -> None:
    """q[T, H, d] = rotated q of qkv; rotated k and v go to their rows of the cache."""
    a = as_int64(args)
    qkv, stride, q, n_rows, n_heads, n_kv, head = a[4], a[5], a[6], a[7], a[8], a[9], a[10]
    position, slot, cos, sin, keys, values = as_int64(a[11]), as_int64(a[12]), a[13], a[14], a[15], a[16]
    t = take(args)
    while t < n_rows:
        row = qkv + t * stride
        cos_row, sin_row = as_float32(cos + 4 * position[t] * head), as_float32(sin + 4 * position[t] * head)
        for h in range(n_heads):
            _rotate(
                as_float32(row + 4 * h * head), as_float32(q + 4 * (t * n_heads + h) * head), cos_row, sin_row, head
            )
        for g in range(n_kv):
            at = 4 * (slot[t] * n_kv + g) * head
            _rotate(as_float32(row + 4 * (n_heads + g) * head), as_float32(keys + at), cos_row, sin_row, head)
            value, out = as_float32(row + 4 * (n_heads + n_kv + g) * head), as_float32(values + at)
            for i in range(head):
                out[i] = value[i]
        t = take(args)


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
        row[i] = _exp((row[i] - top) * scale)
    return _sum(row, n)


@numba.njit
def _add_values(out, p, values, stride, n, head):  # type: ignore[no-untyped-def]
    """out[d] += sum over n keys of p[key] * value[key, d], four keys at a time."""
    j = 0
    while j + 4 <= n:
        at = values + j * stride
        v0, v1, v2, v3 = (
            as_float32(at),
            as_float32(at + stride),
            as_float32(at + 2 * stride),
            as_float32(at + 3 * stride),
        )
        p0, p1, p2, p3 = p[j], p[j + 1], p[j + 2], p[j + 3]
        for i in range(head):
            out[i] += (p0 * v0[i] + p1 * v1[i]) + (p2 * v2[i] + p3 * v3[i])
        j += 4
    while j < n:
        v = as_float32(values + j * stride)
        for i in range(head):
            out[i] += p[j] * v[i]
        j += 1


def paged_attention(args: int) -> None:
    """out[T, H, d]: every thread takes one (query row, key/value head) at a time, with scores in its own scratch."""
    a = as_int64(args)
    q, out, n_rows, n_heads, n_kv, head = a[4], a[5], a[6], a[7], a[8], a[9]
    keys, values, size, tables, table_stride = a[10], a[11], a[12], a[13], a[14]
    sequence, position, scale, window = as_int64(a[15]), as_int64(a[16]), bits_as_float32(a[17]), a[18]
    scratch, scratch_stride, score_stride = a[19], a[20], a[21]
    group, row_bytes = n_heads // n_kv, 4 * n_kv * head
    mine = scratch + scratch_stride * take(args + 16)
    queries, scores = as_int64(mine), mine + 8 * group
    u = take(args)
    while u < n_rows * n_kv:
        t, g = u // n_kv, u % n_kv
        table = as_int32(tables + table_stride * sequence[t])
        first, last = max(0, position[t] + 1 - window), position[t] + 1
        at = 4 * (t * n_heads + g * group) * head
        for h in range(group):
            queries[h] = q + at + 4 * h * head
            row = as_float32(out + at + 4 * h * head)
            for i in range(head):
                row[i] = float32(0.0)
        j = first
        while j < last:
            n = min(size - j % size, last - j)
            block = keys + (table[j // size] * size + j % size) * row_bytes + 4 * g * head
            dot_rows(block, row_bytes, 0, n, mine, group, head, scores + 4 * (j - first), score_stride)
            j += n
        for h in range(group):
            p, row = as_float32(scores + h * score_stride), as_float32(out + at + 4 * h * head)
            total = _softmax(p, last - first, scale)
            j = first
            while j < last:
                n = min(size - j % size, last - j)
                block = values + (table[j // size] * size + j % size) * row_bytes + 4 * g * head
                weights = as_float32(scores + h * score_stride + 4 * (j - first))
                _add_values(row, weights, block, row_bytes, n, head)
                j += n
            for i in range(head):
                row[i] /= total
        u = take(args)


def silu_mul(args: int) -> None:
    """out[T, F] = silu(x[T, :F]) * x[T, F:]."""
    a = as_int64(args)
    x, out, n_rows, f = a[4], a[5], a[6], a[7]
    t = take(args)
    while t < n_rows:
        gate, up, target = as_float32(x + 8 * t * f), as_float32(x + 8 * t * f + 4 * f), as_float32(out + 4 * t * f)
        for i in range(f):
            small = _exp(-abs(gate[i]))
            sigmoid = (float32(1.0) if gate[i] >= 0 else small) / (float32(1.0) + small)
            target[i] = gate[i] * sigmoid * up[i]
        t = take(args)


def run_tape(args: int) -> None:
    """Run the recorded calls, (kernel, its arguments, its team) each: a team of one is the first thread to come."""
    a = as_int64(args)
    barrier, n_calls, calls = a[3], a[4], as_int64(a[5])
    me = take(args + 16)
    for i in range(n_calls):
        function, arguments, team = calls[3 * i], calls[3 * i + 1], calls[3 * i + 2]
        if me < team:
            call(function, arguments)
        if team > 1 or (i + 1 < n_calls and calls[3 * i + 5] > 1):
            wait_for_team(barrier)
        if me == 0:  # for the next run: nobody takes from this call any more
            counters = as_int64(arguments)
            counters[0] = counters[1] = counters[2] = 0


KERNELS = (rms_norm, add_rms_norm, gate_top_k, rotary_write, paged_attention, silu_mul, run_tape)
