"""The innermost products: dot products of weight rows with token rows, written in LLVM code.

Addresses and sizes are int64; strides are in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from workers.kernels.cpu.compiled.jit import intrinsic
from workers.kernels.cpu.compiled.vector import I32, I64, LANES, REGISTERS, Vectors
from workers.kernels.cpu.kernel import FLOAT32

#: Weight rows and most token rows of a tile.
ROWS, COLUMNS = 4, 6


class _Tile(Vectors):
    """Emits the LLVM code of one tile: `rows` weight rows times `columns` token rows, all dot products of length k.

    Every dot product is the same sequence of additions whatever the tile: lane by lane along k, then the lanes
    pairwise. So a row's result does not depend on the rows computed beside it. Weights of 16 bits are made float32
    as they are loaded: the result is that of the same weights in float32.
    """

    def __init__(self, builder: Any, columns: int, kind: int) -> None:
        super().__init__(builder)
        self.columns = columns
        self.kind = kind  # of the weights

    def dots(self, weights: list[Any], ahead: Any, token_rows: Any, k: Any) -> list[list[Any]]:
        """Accumulators [weight row][token row], not yet summed over lanes.

        weights: addresses of the weight rows. ahead: bytes from a weight row to the one that will be wanted next.
        token_rows: address of the token rows' addresses. k: length of a row.
        """
        if self.columns > 1:
            return self._dots(weights, ahead, token_rows, k)
        # Row after row, as they lie in memory: a core reads one stream ahead by itself, a third faster than four.
        return [self._dots([row], None, token_rows, k)[0] for row in weights]

    def _dots(self, weights: list[Any], ahead: Any, token_rows: Any, k: Any) -> list[list[Any]]:
        """All rows side by side; ahead: None where the core is left to fetch by itself."""
        b = self.b

        def c64(value: int) -> Any:
            return ir.Constant(I64, value)

        tokens = [b.load(self.at(b.add(token_rows, c64(8 * j)), I64)) for j in range(self.columns)]
        pairs = [(r, j) for j in range(self.columns) for r in range(len(weights))]
        whole = b.shl(b.and_(k, c64(-LANES)), c64(2))
        byte = ir.IntType(8).as_pointer()
        prefetch = self.function("llvm.prefetch.p0", ir.VoidType(), byte, I32, I32, I32)

        before, body = b.basic_block, b.append_basic_block("body")
        after, rest, done = (b.append_basic_block(name) for name in ("after", "rest", "done"))
        b.cbranch(b.icmp_signed(">", whole, c64(0)), body, after)

        b.position_at_end(body)
        offset = b.phi(I64)
        sums = {pair: b.phi(self.vector) for pair in pairs}
        weight_offset = offset if self.kind == FLOAT32 else b.lshr(offset, c64(1))
        w = [self.load(self.kind, b.add(row, weight_offset)) for row in weights]
        for row in weights if ahead is not None else ():
            wanted = b.inttoptr(b.add(b.add(row, weight_offset), ahead), byte)
            b.call(prefetch, [wanted, I32(0), I32(2), I32(1)])
        added = {}
        for j, token in enumerate(tokens):
            x = self.load(FLOAT32, b.add(token, offset))
            for r in range(len(weights)):
                added[r, j] = self.fma(w[r], x, sums[r, j])
        following = b.add(offset, c64(4 * LANES))
        offset.add_incoming(c64(0), before)
        offset.add_incoming(following, body)
        for pair in pairs:
            sums[pair].add_incoming(self.zero, before)
            sums[pair].add_incoming(added[pair], body)
        b.cbranch(b.icmp_signed("<", following, whole), body, after)

        b.position_at_end(after)
        main = {pair: self._either(added[pair], body, self.zero, before) for pair in pairs}
        left = b.and_(k, c64(LANES - 1))
        b.cbranch(b.icmp_signed(">", left, c64(0)), rest, done)

        b.position_at_end(rest)
        mask = self.first_lanes(left)
        whole_weights = whole if self.kind == FLOAT32 else b.lshr(whole, c64(1))
        w = [self.load(self.kind, b.add(row, whole_weights), mask) for row in weights]
        x = [self.load(FLOAT32, b.add(token, whole), mask) for token in tokens]
        tail = {(r, j): self.fma(w[r], x[j], main[r, j]) for r, j in pairs}
        b.branch(done)

        b.position_at_end(done)
        total = {pair: self._either(tail[pair], rest, main[pair], after) for pair in pairs}
        return [[total[r, j] for j in range(self.columns)] for r in range(len(weights))]

    def rows(self, weight: Any, stride: Any, first: int, n: int) -> list[Any]:
        """The addresses of `n` rows from row `first` on."""
        return [self.b.add(weight, self.b.mul(stride, ir.Constant(I64, first + r))) for r in range(n)]

    def _either(self, one: Any, one_block: Any, other: Any, other_block: Any) -> Any:
        phi = self.b.phi(self.vector)
        phi.add_incoming(one, one_block)
        phi.add_incoming(other, other_block)
        return phi

    def sums(self, vectors: list[Any]) -> list[Any]:
        """Vectors whose lanes, one after the other, are the sums over the lanes of each of `vectors`."""
        lanes = list(range(0, 2 * LANES, 2))
        for _ in range(int(math.log2(LANES))):
            if len(vectors) % 2:
                vectors = [*vectors, vectors[-1]]
            evens = [self.shuffle(a, c, lanes) for a, c in zip(vectors[::2], vectors[1::2], strict=True)]
            odds = [
                self.shuffle(a, c, [lane + 1 for lane in lanes])
                for a, c in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            vectors = [self.b.fadd(even, odd) for even, odd in zip(evens, odds, strict=True)]
        return vectors

    def store_sums(self, sums: list[Any], rows: int, out: Any, stride: Any) -> None:
        """Write sum (r, j), which is lane `j * rows + r`, to `out[j, r]`; `stride` is the bytes from j to j + 1."""
        for j in range(self.columns):
            vector, first = sums[j * rows // LANES], j * rows % LANES
            lanes = self.shuffle(vector, vector, list(range(first, first + rows)))
            self.b.store(lanes, self.at(out, lanes.type), align=4)
            out = self.b.add(out, stride)


def dots(kind: int, rows: int, columns: int) -> Any:
    """The product of `rows` weight rows of a `kind` with `columns` token rows:
    `out[j, r] = dot(weight row r, token row j)`, stride in bytes.

    Call it as `(weight, 0, weight_stride, token_rows, k, out, out_stride, ahead)`, addresses and bytes.
    """

    def emit(tile: _Tile, args: Any, first: int, rows: int) -> None:
        weight, _, stride, tokens, k, out, out_stride, ahead = args
        acc = tile.dots(tile.rows(weight, stride, first, rows), ahead, tokens, k)
        sums = tile.sums([acc[r][j] for j in range(columns) for r in range(rows)])
        tile.store_sums(sums, rows, tile.b.add(out, ir.Constant(I64, 4 * first)), out_stride)

    return _tile(kind, rows, 1, columns, emit)


def swiglu(kind: int, rows: int, columns: int) -> Any:
    """`out[j, r] = silu(dot(gate row r, token row j)) * dot(up row r, token row j)`, stride in bytes; half as many.

    Call it as `(gate, up, weight_stride, token_rows, k, out, out_stride, ahead)`, addresses and bytes.
    """

    def emit(tile: _Tile, args: Any, first: int, rows: int) -> None:
        gate, up, stride, tokens, k, out, out_stride, ahead = args
        weights = [*tile.rows(gate, stride, first, rows), *tile.rows(up, stride, first, rows)]
        acc = tile.dots(weights, ahead, tokens, k)
        order = [(r, j) for j in range(columns) for r in range(rows)]
        gates, ups = tile.sums([acc[r][j] for r, j in order]), tile.sums([acc[rows + r][j] for r, j in order])
        both = [tile.b.fmul(tile.silu(g), u) for g, u in zip(gates, ups, strict=True)]
        tile.store_sums(both, rows, tile.b.add(out, ir.Constant(I64, 4 * first)), out_stride)

    return _tile(kind, rows, 2, columns, emit)


def _tile(kind: int, rows: int, matrices: int, columns: int, emit: Callable[[_Tile, Any, int, int], None]) -> Any:
    """The tile in as few parts as the registers allow: accumulators, a vector of each weight row and one of x."""
    parts = 1 if matrices * rows * (columns + 1) < REGISTERS else 2
    rows_of_part = max(rows // parts, 1)

    @intrinsic
    def tile(
        _context: Any, _w: Any, _up: Any, _dw: Any, _tokens: Any, _k: Any, _out: Any, _dout: Any, _ahead: Any
    ) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            for first in range(0, rows, rows_of_part):
                emit(_Tile(b, columns, kind), args, first, rows_of_part)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile
