"""The weighted sum of value rows that attention ends with, written in LLVM code.

Addresses and sizes are int64; strides are in bytes. Imported only to build the kernels (see `library`): numba is here.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types

from workers.kernels.cpu.compiled.jit import intrinsic
from workers.kernels.cpu.compiled.vector import F32, I64, LANES, REGISTERS, Vectors
from workers.kernels.cpu.kernel import FLOAT32

#: Query rows of a tile, and its vectors of a value row; the sums of a tile stay in registers.
QUERIES, VECTORS = 4, REGISTERS // 8
_WIDTH = LANES * VECTORS


def _add(queries: int, vectors: int) -> Any:
    """`out[q, i] += weight[q, key] * value[key, i]` for `vectors` of i, from `at` on, one key after the other.

    Of a single vector the first `width` lanes count. `outs`: the address of the rows' addresses. n keys, at least one.
    """

    @intrinsic
    def add(
        _context: Any, _outs: Any, _w: Any, _dw: Any, _values: Any, _dv: Any, _n: Any, _at: Any, _width: Any
    ) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            outs, weights, dw, values, dv, n, at, width = args
            v, zero, one = Vectors(b), ir.Constant(I64, 0), ir.Constant(I64, 1)
            mask = v.first_lanes(width) if vectors == 1 else None
            offsets = [b.add(at, ir.Constant(I64, 4 * LANES * i)) for i in range(vectors)]
            rows = [b.load(v.at(b.add(outs, ir.Constant(I64, 8 * q)), I64)) for q in range(queries)]
            places = [b.add(row, offset) for row in rows for offset in offsets]
            begun = [v.load(FLOAT32, place, mask) for place in places]
            before, body, done = b.basic_block, b.append_basic_block("body"), b.append_basic_block("done")
            b.branch(body)

            b.position_at_end(body)
            key = b.phi(I64)
            sums = [b.phi(v.vector) for _ in places]
            row, weight = b.add(values, b.mul(key, dv)), b.add(weights, b.shl(key, ir.Constant(I64, 2)))
            value = [v.load(FLOAT32, b.add(row, offset), mask) for offset in offsets]
            added = []
            for q in range(queries):
                every = v.all_lanes(b.load(v.at(b.add(weight, b.mul(dw, ir.Constant(I64, q))), F32)))
                added += [v.fma(every, value[i], sums[q * vectors + i]) for i in range(vectors)]
            following = b.add(key, one)
            key.add_incoming(zero, before)
            key.add_incoming(following, body)
            for total, first, next_ in zip(sums, begun, added, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(next_, body)
            b.cbranch(b.icmp_signed("<", following, n), body, done)

            b.position_at_end(done)
            for place, total in zip(places, added, strict=True):
                v.store(total, place, mask)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return add


_many, _one = _add(QUERIES, VECTORS), _add(1, VECTORS)
_many_last, _one_last = _add(QUERIES, 1), _add(1, 1)


@numba.njit(inline="never")
def add_values(outs, n_queries, weights, dw, values, dv, n, head):  # type: ignore[no-untyped-def]
    """`out[q] += the sum over n keys of weight[q, key] * value[key]`, key after key, whatever is computed beside it."""
    if n <= 0:
        return
    q = 0
    while q < n_queries:
        together = n_queries - q >= QUERIES
        out, weight, i = outs + 8 * q, weights + q * dw, 0
        while i + _WIDTH <= head:
            if together:
                _many(out, weight, dw, values, dv, n, 4 * i, 0)
            else:
                _one(out, weight, dw, values, dv, n, 4 * i, 0)
            i += _WIDTH
        while i < head:
            width = min(LANES, head - i)
            if together:
                _many_last(out, weight, dw, values, dv, n, 4 * i, width)
            else:
                _one_last(out, weight, dw, values, dv, n, 4 * i, width)
            i += LANES
        q += QUERIES if together else 1
