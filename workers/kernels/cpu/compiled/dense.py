"""The CPU kernels of the dense half beside products and attention: norms, rotary embedding with the cache write, gate.

Imported only to build them (see `library`): numba is here.
"""

from __future__ import annotations

import numba
from numba import float32

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_float32, as_int64, call, exp, reader, sqrt, take, wait_for_team

#: Rows of a norm that one thread takes at a time.
NORM_ROWS = 4

_norm, _rotary, _gate = reader(arguments.Norm), reader(arguments.RotaryWrite), reader(arguments.Gate)
_gate_rows, _run_graph = reader(arguments.GateRows), reader(arguments.RunGraph)


@numba.njit(fastmath=True)
def _square_sum(row, d):  # type: ignore[no-untyped-def]
    total = float32(0.0)
    for i in range(d):
        total += row[i] * row[i]
    return total


@numba.njit
def _normalise(row, weight, out, d, eps):  # type: ignore[no-untyped-def]
    scale = float32(1.0) / sqrt(_square_sum(row, d) / float32(d) + eps)
    for i in range(d):
        out[i] = weight[i] * (row[i] * scale)


def norm(args: int) -> None:
    """See `arguments.Norm`."""
    a = _norm(args)
    first = NORM_ROWS * take(args)
    while first < a.n_rows:
        for t in range(first, min(first + NORM_ROWS, a.n_rows)):
            row = as_float32(a.x + t * a.x_stride)
            if a.delta != 0:
                more = as_float32(a.delta + t * a.delta_stride)
                if a.scale == 1.0:
                    for i in range(a.d):
                        row[i] += more[i]
                else:
                    for i in range(a.d):
                        row[i] += a.scale * more[i]
            if a.weight != 0:
                _normalise(row, as_float32(a.weight), as_float32(a.y + 4 * t * a.d), a.d, a.eps)
        first = NORM_ROWS * take(args)


def gate(args: int) -> None:
    """ids[T, K], weights[T, K]: the best experts of each row by score (and bias), best first; see `GateSpec`."""
    a = _gate(args)
    scores, ids, weights, n, k = as_float32(a.scores), as_int64(a.ids), as_float32(a.weights), a.n_experts, a.k
    for t in range(a.n_rows):
        row, total = as_float32(a.logits + t * a.logits_stride), float32(0.0)
        if a.sigmoid != 0:
            for e in range(n):
                scores[e] = float32(1.0) / (float32(1.0) + exp(-row[e]))
        else:
            top = row[0]
            for e in range(n):
                top = max(top, row[e])
            for e in range(n):
                scores[e] = exp(row[e] - top)
            for e in range(n):
                total += scores[e]
            for e in range(n):
                scores[e] /= total
        total = float32(0.0)
        for choice in range(t * k, t * k + k):
            best, most = -1, float32(0.0)
            for e in range(n):
                score = scores[e] + as_float32(a.bias)[e] if a.bias != 0 else scores[e]
                if best < 0 or score > most:
                    taken = False
                    for earlier in range(t * k, choice):
                        taken |= ids[earlier] == e
                    if not taken:
                        best, most = e, score
            ids[choice] = best
            weights[choice] = scores[best]
            total += scores[best]
        for choice in range(t * k, t * k + k):
            if a.normalize != 0:
                weights[choice] /= total
            weights[choice] *= a.scale


def gate_rows(args: int) -> None:
    """See `arguments.GateRows`."""
    a = _gate_rows(args)
    t = take(args)
    while t < a.n_rows:
        row = as_float32(a.y + 4 * t * a.d)
        weight = float32(1.0) / (float32(1.0) + exp(-as_float32(a.logits)[t]))
        for i in range(a.d):
            row[i] *= weight
        t = take(args)


@numba.njit
def _heads(source, out, n_heads, head, rotated, cos, sin, weight, norm_size, eps):  # type: ignore[no-untyped-def]
    """out = the heads of a row, normalised where there is a weight, and rotated."""
    size = n_heads * head
    if weight == 0:
        row, target = as_float32(source), as_float32(out)
        for i in range(size):
            target[i] = row[i]
    else:
        for at in range(0, size, norm_size):
            _normalise(as_float32(source + 4 * at), as_float32(weight), as_float32(out + 4 * at), norm_size, eps)
    half = rotated // 2
    for h in range(n_heads):
        one, two = as_float32(out + 4 * h * head), as_float32(out + 4 * (h * head + half))
        for i in range(half):
            x, y = one[i], two[i]
            one[i] = x * cos[i] - y * sin[i]
            two[i] = y * cos[half + i] + x * sin[half + i]


def rotary_write(args: int) -> None:
    """q[T, H, d] = normalised, rotated q of qkv; k, treated alike, and v go to their rows of the cache."""
    a = _rotary(args)
    t = take(args)
    while t < a.n_rows:
        q = a.qkv + t * a.qkv_stride
        k = q + 4 * a.n_heads * a.head
        v = k + 4 * a.n_kv * a.head
        cos, sin = as_float32(a.cos + 4 * t * a.rotated), as_float32(a.sin + 4 * t * a.rotated)
        q_out, at = a.q + 4 * t * a.n_heads * a.head, 4 * as_int64(a.slot)[t] * a.n_kv * a.head
        _heads(q, q_out, a.n_heads, a.head, a.rotated, cos, sin, a.q_norm, a.q_norm_size, a.eps)
        _heads(k, a.keys + at, a.n_kv, a.head, a.rotated, cos, sin, a.k_norm, a.k_norm_size, a.eps)
        value, out = as_float32(v), as_float32(a.values + at)
        for i in range(a.n_kv * a.head):
            out[i] = value[i]
        t = take(args)


def run_graph(args: int) -> None:
    """Run the captured calls, (kernel, its arguments, its team) each: a team of one is the first thread to come."""
    a = _run_graph(args)
    barrier, calls, me = as_int64(args)[3], as_int64(a.calls), take(args + 16)
    for i in range(a.n_calls):
        function, arguments_, team = calls[3 * i], calls[3 * i + 1], calls[3 * i + 2]
        if me < team:
            call(function, arguments_)
        if team > 1 or (i + 1 < a.n_calls and calls[3 * i + 5] > 1):
            wait_for_team(barrier)
        if me == 0:  # for the next replay: nobody takes from this call any more
            counters = as_int64(arguments_)
            counters[0] = counters[1] = counters[2] = 0


KERNELS = (norm, gate, gate_rows, rotary_write, run_graph)
