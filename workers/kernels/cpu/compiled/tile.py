"""The innermost products: dot products of weight rows with token rows, written in LLVM code.

Addresses and sizes are int64; strides are in bytes.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types

from workers.kernels.cpu.compiled.jit import intrinsic
from workers.kernels.cpu.compiled.vector import I32, I64, LANES, REGISTERS, Vectors
from workers.kernels.cpu.kernel import FLOAT32

#: Weight rows and most token rows of a tile.
ROWS, COLUMNS = 4, 6
#: Up to so many token rows, the memory is what a tile waits for.
_WAITING = 5


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
        if ahead is not None:
            further = self.anew(b.add(weight_offset, ahead))
            for row in weights:
                b.call(prefetch, [b.inttoptr(b.add(row, further), byte), I32(0), I32(2), I32(1)])
        added = {}
        if 1 < self.columns <= _WAITING:
            # x is loaded again for each weight row: so a core runs less far ahead of the weights it asked for early,
            # and streams them up to a half faster.
            for r in range(len(weights)):
                again = self.anew(offset)
                for j, token in enumerate(tokens):
                    added[r, j] = self.fma(w[r], self.load(FLOAT32, b.add(token, again)), sums[r, j])
        else:
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

    Call it as `(weight, weight_stride, token_rows, k, out, out_stride, ahead)`, addresses and bytes.
    """
    # In as few parts as the registers allow: accumulators, a vector of each weight row and one of x.
    part = rows if rows * (columns + 1) < REGISTERS else rows // 2

    @intrinsic
    def tile(_context: Any, _w: Any, _dw: Any, _tokens: Any, _k: Any, _out: Any, _dout: Any, _ahead: Any) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            weight, stride, tokens, k, out, out_stride, ahead = args
            tile = _Tile(b, columns, kind)
            for first in range(0, rows, part):
                acc = tile.dots(tile.rows(weight, stride, first, part), ahead, tokens, k)
                sums = tile.sums([acc[r][j] for j in range(columns) for r in range(part)])
                tile.store_sums(sums, part, b.add(out, ir.Constant(I64, 4 * first)), out_stride)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile
