"""The innermost products for many rows: panels of weights, transposed once, times tiles of token rows.

A panel is 2 * LANES weight rows as float32, turned so that a vector holds one column of LANES of them: vector
`panel[k, half]`. Each is then multiplied with as many token rows as fit the registers. Addresses and sizes are int64;
strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from workers.kernels.jit import intrinsic
from workers.kernels.native import FLOAT32
from workers.kernels.vector import F32, I64, LANES, REGISTERS, Vectors

#: Weight rows of a panel.
PANEL = 2 * LANES
#: Most token rows of a tile: two accumulators each, two vectors of the panel and one of a token row fit the registers.
ROWS = 14 if REGISTERS == 32 else 6
_UNROLLED = 4

Step = Callable[[Any, list[Any]], list[Any]]


def _c64(value: int) -> Any:
    return ir.Constant(I64, value)


class _Panel(Vectors):
    """Emits the code."""

    def loop(self, first: Any, end: Any, by: int, values: list[Any], step: Step) -> list[Any]:
        """`values = step(i, values)` for i from `first` in steps of `by` as long as all of them are below `end`."""
        b = self.b
        before, body, after = b.basic_block, b.append_basic_block("body"), b.append_basic_block("after")
        last = b.sub(end, _c64(by))
        b.cbranch(b.icmp_signed("<=", first, last), body, after)
        b.position_at_end(body)
        i = b.phi(I64)
        held = [b.phi(value.type) for value in values]
        new = step(i, held)
        following = b.add(i, _c64(by))
        b.cbranch(b.icmp_signed("<=", following, last), body, after)
        for phi, begin, next_ in zip([i, *held], [first, *values], [following, *new], strict=True):
            phi.add_incoming(begin, before)
            phi.add_incoming(next_, b.basic_block)
        b.position_at_end(after)
        result = []
        for begin, next_ in zip(values, new, strict=True):
            phi = b.phi(begin.type)
            phi.add_incoming(begin, before)
            phi.add_incoming(next_, body)
            result.append(phi)
        return result

    def transposed(self, rows: list[Any]) -> list[Any]:
        """LANES vectors, lane i of vector j exchanged with lane j of vector i."""
        distance = 1
        while distance < LANES:
            keep = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            move = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            for i in range(LANES):
                if not i & distance:
                    one, other = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = self.shuffle(one, other, keep), self.shuffle(one, other, move)
            distance *= 2
        return rows

    def pack(self, kind: int, rows: list[Any], k: Any, half: Any) -> None:
        """Turn LANES weight rows, given by their addresses, into the half of a panel at an address."""
        b, size = self.b, 4 if kind == FLOAT32 else 2

        def block(column: Any, mask: Any) -> None:
            at = b.mul(column, _c64(size))
            for i, vector in enumerate(self.transposed([self.load(kind, b.add(row, at), mask) for row in rows])):
                to = b.add(half, b.mul(b.add(column, _c64(i)), _c64(4 * PANEL)))
                b.store(vector, self.at(to, self.vector), align=4)

        def whole(column: Any, _: list[Any]) -> list[Any]:
            block(column, None)
            return []

        self.loop(_c64(0), k, LANES, [], whole)
        left = b.and_(k, _c64(LANES - 1))
        with b.if_then(b.icmp_signed(">", left, _c64(0))):
            block(b.sub(k, left), self.first_lanes(left))

    def products(self, n_rows: int, panel: Any, token_rows: Any, k: Any) -> list[list[Any]]:
        """[token row][half]: the dot products of `n_rows` token rows with the rows of a panel, added in order of k."""
        b = self.b
        tokens = [b.load(self.at(b.add(token_rows, _c64(8 * j)), I64)) for j in range(n_rows)]

        def column(i: Any, sums: list[Any]) -> list[Any]:
            at = b.add(panel, b.mul(i, _c64(4 * PANEL)))
            halves = [self.load(FLOAT32, b.add(at, _c64(4 * LANES * half))) for half in range(2)]
            added = []
            for j, token in enumerate(tokens):
                address = b.add(token, b.mul(i, _c64(4)))
                x = self.all_lanes(b.load(self.at(address, F32), align=4))
                added += [self.fma(x, halves[half], sums[2 * j + half]) for half in range(2)]
            return added

        def columns(i: Any, sums: list[Any]) -> list[Any]:
            for more in range(_UNROLLED):
                sums = column(b.add(i, _c64(more)), sums)
            return sums

        sums = self.loop(_c64(0), k, _UNROLLED, [self.zero] * (2 * n_rows), columns)
        sums = self.loop(b.and_(k, _c64(-_UNROLLED)), k, 1, sums, column)
        return [sums[2 * j : 2 * j + 2] for j in range(n_rows)]


def pack(kind: int) -> Any:
    """Turn up to LANES weight rows of a kind into half a panel; call it as `(weight, stride, n_rows, k, half)`.

    Lanes of rows that there are not hold a copy of the last one. Room for k rounded up to LANES is written to.
    """

    @intrinsic
    def packed(_context: Any, _weight: Any, _stride: Any, _n: Any, _k: Any, _half: Any) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            weight, stride, n_rows, k, half = args
            last = b.sub(n_rows, _c64(1))
            rows = []
            for r in range(LANES):
                number = b.select(b.icmp_signed("<", _c64(r), last), _c64(r), last)
                rows.append(b.add(weight, b.mul(number, stride)))
            _Panel(b).pack(kind, rows, k, half)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return packed


def panel_dots(n_rows: int) -> Any:
    """`out[j, n] = dot(row n of the panel, token row j)` for n below `n_columns`, `n_rows` token rows.

    Call it as `(panel, token_rows, k, out, out_stride, n_columns)`.
    """

    def write(emit: _Panel, halves: list[Any], out: Any, n_columns: Any) -> None:
        for half, vector in enumerate(halves):
            mask = emit.first_lanes(emit.b.sub(n_columns, _c64(LANES * half)))
            emit.store(vector, emit.b.add(out, _c64(4 * LANES * half)), mask)

    return _tile(n_rows, write)


def panel_swiglu(n_rows: int) -> Any:
    """`out[j, n] = silu(dot(row n of the first half, token row j)) * dot(row n of the second half, token row j)`.

    Call it as `(panel, token_rows, k, out, out_stride, n_columns)`.
    """

    def write(emit: _Panel, halves: list[Any], out: Any, n_columns: Any) -> None:
        emit.store(emit.b.fmul(emit.silu(halves[0]), halves[1]), out, emit.first_lanes(n_columns))

    return _tile(n_rows, write)


def _tile(n_rows: int, write: Callable[[_Panel, list[Any], Any, Any], None]) -> Any:
    @intrinsic
    def tile(_context: Any, _panel: Any, _tokens: Any, _k: Any, _out: Any, _stride: Any, _columns: Any) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            panel, token_rows, k, out, out_stride, n_columns = args
            emit = _Panel(b)
            for halves in emit.products(n_rows, panel, token_rows, k):
                write(emit, halves, out, n_columns)
                out = b.add(out, out_stride)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return tile
