"""The CPU kernels of products: of the dense half, and of all experts of a layer at once.

Imported only to build them (see `library`): numba is here.
"""

from __future__ import annotations

import numba
from numba import float32

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_float32, as_int32, as_int64, exp, reader, take, wait_for_team
from workers.kernels.cpu.compiled.rows import dots
from workers.kernels.cpu.kernel import FLOAT32

#: Weight rows that one thread takes at a time.
UNIT = 64

_linear, _pairs, _experts = reader(arguments.Linear), reader(arguments.Pairs), reader(arguments.Experts)


@numba.njit(inline="never")
def _swiglu(kind, w13, f, k, first, last, token_rows, n_rows, out, out_stride):  # type: ignore[no-untyped-def]
    """out[t, n] = silu(gate row n . token row t) * (up row n . token row t) for n in first:last, from out[0, first] on.

    w13 [2F, k] has the up rows behind the gate rows. What they give lies in out[t, F + n]: each is read as one stream.
    """
    stride, ups = (4 if kind == FLOAT32 else 2) * k, out + 4 * f
    dots(kind, w13, stride, first, last, token_rows, n_rows, k, out, out_stride)
    dots(kind, w13, stride, f + first, f + last, token_rows, n_rows, k, ups, out_stride)
    for t in range(n_rows):
        gate, up = as_float32(out + t * out_stride), as_float32(ups + t * out_stride)
        for i in range(last - first):
            gate[i] = gate[i] / (float32(1.0) + exp(-gate[i])) * up[i]


def linear(args: int) -> None:
    """See `arguments.Linear`."""
    a = _linear(args)
    stride = (4 if a.kind == FLOAT32 else 2) * a.k
    token_rows = a.rows + 8 * a.n_rows * take(args + 16)  # every thread has its own
    rows = as_int64(token_rows)
    for t in range(a.n_rows):
        rows[t] = a.x + t * a.x_stride
    columns = a.n // 2 if a.gated != 0 else a.n
    first = UNIT * take(args)
    while first < columns:
        last, y = min(columns, first + UNIT), a.y + 4 * first
        if a.gated != 0:
            _swiglu(a.kind, a.weight, columns, a.k, first, last, token_rows, a.n_rows, y, 4 * a.n)
        else:
            dots(a.kind, a.weight, stride, first, last, token_rows, a.n_rows, a.k, y, 4 * a.n)
        if a.bias != 0:
            bias = as_float32(a.bias + 4 * first)
            for t in range(a.n_rows):
                row = as_float32(y + 4 * t * a.n)
                for i in range(last - first):
                    row[i] += bias[i]
        first = UNIT * take(args)


@numba.njit(inline="never")
def place_pairs(args):  # type: ignore[no-untyped-def]
    """See `arguments.Pairs`."""
    a = _pairs(args)
    token, expert, table, counters = as_int32(a.token), as_int32(a.expert), as_int64(a.table), as_int64(a.counters)
    starts, token_rows, hidden_rows = as_int64(a.starts), as_int64(a.token_rows), as_int64(a.hidden_rows)
    following = 0
    for p in range(a.n_pairs):
        while following <= expert[p]:
            starts[following] = p
            following += 1
        token_rows[p] = a.x + token[p] * a.x_stride
        hidden_rows[p] = a.hidden + p * a.hidden_stride
    while following <= a.n_experts:
        starts[following] = a.n_pairs
        following += 1
    active, n_active = as_int64(a.active), 0
    for e in range(a.n_experts):
        count = starts[e + 1] - starts[e]
        if count > 0 and table[2 * e] != 0:
            counters[e] += count
            n_active += 1
            active[n_active] = e
        elif count > 0:
            as_int64(a.missing)[0] += count
    active[0] = n_active


def pairs(args: int) -> None:
    """See `arguments.Pairs`."""
    place_pairs(args)


def experts(args: int) -> None:
    """See `arguments.Experts`: first all hidden rows, then all results, shared out by blocks of weight rows."""
    a = _experts(args)
    table, active, starts = as_int64(a.table), as_int64(a.active), as_int64(a.starts)
    stride = (4 if a.kind == FLOAT32 else 2) * a.f
    blocks = (a.f + UNIT - 1) // UNIT
    u = take(args)
    while u < active[0] * blocks:
        e, first = active[1 + u // blocks], UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        out, rows = a.hidden + begin * a.hidden_stride + 4 * first, a.token_rows + 8 * begin
        last = min(a.f, first + UNIT)
        _swiglu(a.kind, table[2 * e], a.f, a.d, first, last, rows, count, out, a.hidden_stride)
        u = take(args)
    wait_for_team(as_int64(args)[3])
    blocks = (a.d + UNIT - 1) // UNIT
    u = take(args + 8)
    while u < active[0] * blocks:
        e, first = active[1 + u // blocks], UNIT * (u % blocks)
        begin, count = starts[e], starts[e + 1] - starts[e]
        rows, out, last = a.hidden_rows + 8 * begin, a.y + 4 * (begin * a.d + first), min(a.d, first + UNIT)
        dots(a.kind, table[2 * e + 1], stride, first, last, rows, count, a.f, out, 4 * a.d)
        u = take(args + 8)


KERNELS = (linear, pairs, experts)
