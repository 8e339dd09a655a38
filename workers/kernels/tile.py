"""The innermost products of the CPU kernels, written for the host's vector registers in LLVM code.

Addresses and sizes are int64; strides are in bytes.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

from workers.kernels.jit import intrinsic
from workers.kernels.native import BFLOAT16, FLOAT32

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _vector_registers() -> tuple[int, int]:
    """(float32 lanes of a vector register, number of registers) of the host."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx2") and features.get("fma"):
        return 8, 16
    return 4, 16 if llvmlite.binding.get_process_triple().startswith("x86_64") else 32


LANES, _REGISTERS = _vector_registers()
#: Token rows of one tile: 4 weight rows x COLUMNS accumulators, 4 weight vectors and one of x fit the registers.
COLUMNS = 6 if _REGISTERS == 32 else 2


class _Tile:
    """Emits the LLVM code of one tile: `rows` weight rows times `columns` token rows, all dot products of length k.

    Every dot product is the same sequence of additions whatever the tile: lane by lane along k, then the lanes
    pairwise. So a row's result does not depend on the rows computed beside it. Weights of 16 bits are made float32,
    which is exact, as they are loaded: the result is that of the same weights in float32.
    """

    def __init__(self, builder: Any, columns: int, kind: int) -> None:
        self.b = builder
        self.columns = columns
        self.kind = kind  # of the weights
        self.vector = ir.VectorType(_F32, LANES)
        self.zero = ir.Constant(self.vector, [0.0] * LANES)
        #: What LANES weights are in memory.
        self.stored = self.vector if kind == FLOAT32 else ir.VectorType(_I16, LANES)

    def at(self, address: Any, type_: Any) -> Any:
        return self.b.inttoptr(address, type_.as_pointer())

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, list(arguments)), name)

    def dots(self, weights: list[Any], ahead: Any, token_rows: Any, k: Any) -> list[list[Any]]:
        """Accumulators [weight row][token row], not yet summed over lanes.

        weights: addresses of the weight rows. ahead: bytes from a weight row to the one that will be wanted next.
        token_rows: address of the token rows' addresses. k: length of a row.
        """
        b = self.b

        def c64(value: int) -> Any:
            return ir.Constant(_I64, value)

        tokens = [b.load(self.at(b.add(token_rows, c64(8 * j)), _I64)) for j in range(self.columns)]
        pairs = [(r, j) for j in range(self.columns) for r in range(len(weights))]
        whole = b.shl(b.and_(k, c64(-LANES)), c64(2))
        fma = self.function(f"llvm.fma.v{LANES}f32", self.vector, *[self.vector] * 3)
        byte = ir.IntType(8).as_pointer()
        prefetch = self.function("llvm.prefetch.p0", ir.VoidType(), byte, _I32, _I32, _I32)

        before, body = b.basic_block, b.append_basic_block("body")
        after, rest, done = (b.append_basic_block(name) for name in ("after", "rest", "done"))
        b.cbranch(b.icmp_signed(">", whole, c64(0)), body, after)

        b.position_at_end(body)
        offset = b.phi(_I64)
        sums = {pair: b.phi(self.vector) for pair in pairs}
        weight_offset = offset if self.kind == FLOAT32 else b.lshr(offset, c64(1))
        w = [self.widened(b.load(self.at(b.add(row, weight_offset), self.stored), align=2)) for row in weights]
        for row in weights:
            wanted = b.inttoptr(b.add(b.add(row, weight_offset), ahead), byte)
            b.call(prefetch, [wanted, _I32(0), _I32(2), _I32(1)])
        added = {}
        for j, token in enumerate(tokens):
            x = b.load(self.at(b.add(token, offset), self.vector), align=4)
            for r in range(len(weights)):
                added[r, j] = b.call(fma, [w[r], x, sums[r, j]])
        following = b.add(offset, c64(4 * LANES))
        offset.add_incoming(c64(0), before)
        offset.add_incoming(following, body)
        for pair in pairs:
            sums[pair].add_incoming(self.zero, before)
            sums[pair].add_incoming(added[pair], body)
        b.cbranch(b.icmp_signed("<", following, whole), body, after)

        b.position_at_end(after)
        main = {pair: self._either(added[pair], body, self.zero, before) for pair in pairs}
        left = b.trunc(b.and_(k, c64(LANES - 1)), _I32)
        b.cbranch(b.icmp_signed(">", left, _I32(0)), rest, done)

        b.position_at_end(rest)
        lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES)))
        spread = b.insert_element(ir.Constant(lanes.type, ir.Undefined), left, _I32(0))
        spread = b.shuffle_vector(spread, spread, ir.Constant(lanes.type, [0] * LANES))
        mask = b.icmp_signed("<", lanes, spread)
        whole_weights = whole if self.kind == FLOAT32 else b.lshr(whole, c64(1))
        w = [self.widened(self.masked(b.add(row, whole_weights), self.stored, mask)) for row in weights]
        x = [self.masked(b.add(token, whole), self.vector, mask) for token in tokens]
        tail = {(r, j): b.call(fma, [w[r], x[j], main[r, j]]) for r, j in pairs}
        b.branch(done)

        b.position_at_end(done)
        total = {pair: self._either(tail[pair], rest, main[pair], after) for pair in pairs}
        return [[total[r, j] for j in range(self.columns)] for r in range(len(weights))]

    def masked(self, address: Any, type_: Any, mask: Any) -> Any:
        """A vector of which only the lanes in `mask` are loaded; the others are zero."""
        name = f"llvm.masked.load.v{LANES}{'f32' if type_ == self.vector else 'i16'}.p0"
        load = self.function(name, type_, type_.as_pointer(), _I32, mask.type, type_)
        return self.b.call(load, [self.at(address, type_), _I32(2), mask, ir.Constant(type_, None)])

    def widened(self, weights: Any) -> Any:
        """LANES weights as float32."""
        if self.kind == FLOAT32:
            return weights
        if self.kind == BFLOAT16:  # the upper half of a float32
            words = self.b.zext(weights, ir.VectorType(_I32, LANES))
            return self.b.bitcast(self.b.shl(words, ir.Constant(words.type, [16] * LANES)), self.vector)
        return self.b.fpext(self.b.bitcast(weights, ir.VectorType(ir.HalfType(), LANES)), self.vector)

    def _either(self, one: Any, one_block: Any, other: Any, other_block: Any) -> Any:
        phi = self.b.phi(self.vector)
        phi.add_incoming(one, one_block)
        phi.add_incoming(other, other_block)
        return phi

    def shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        return self.b.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

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

    def store(self, sums: list[Any], rows: int, out: Any, stride: Any) -> None:
        """Write sum (r, j), which is lane `j * rows + r`, to `out[j, r]`; `stride` is the bytes from j to j + 1."""
        for j in range(self.columns):
            vector, first = sums[j * rows // LANES], j * rows % LANES
            lanes = self.shuffle(vector, vector, list(range(first, first + rows)))
            self.b.store(lanes, self.at(out, lanes.type), align=4)
            out = self.b.add(out, stride)

    def silu(self, x: Any) -> Any:
        """`x / (1 + exp(-x))`, exp within 2 ulp: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2]."""
        b = self.b

        def const(value: float) -> Any:
            return ir.Constant(self.vector, [value] * LANES)

        fma = self.function(f"llvm.fma.v{LANES}f32", self.vector, *[self.vector] * 3)
        lower = self.function(f"llvm.minnum.v{LANES}f32", self.vector, self.vector, self.vector)
        upper = self.function(f"llvm.maxnum.v{LANES}f32", self.vector, self.vector, self.vector)
        round_ = self.function(f"llvm.rint.v{LANES}f32", self.vector, self.vector)
        minus = b.call(upper, [b.call(lower, [b.fsub(self.zero, x), const(88.0)]), const(-87.0)])
        power = b.call(round_, [b.fmul(minus, const(1.4426950216293335))])
        rest = b.call(fma, [power, const(-0.693359375), minus])
        rest = b.call(fma, [power, const(2.12194442e-4), rest])
        value = const(1 / 5040)
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            value = b.call(fma, [value, rest, const(1 / factorial)])
        whole = b.fptosi(power, ir.VectorType(_I32, LANES))
        bits = ir.Constant(whole.type, [127] * LANES)
        scale = b.bitcast(b.shl(b.add(whole, bits), ir.Constant(whole.type, [23] * LANES)), self.vector)
        return b.fdiv(x, b.fadd(const(1.0), b.fmul(value, scale)))


def dot_tile(kind: int, rows: int, columns: int) -> Any:
    """The product of `rows` weight rows of a `kind` with `columns` token rows:
    `out[j, r] = dot(weight row r, token row j)`, stride in bytes.

    Call it as `(weight, weight_stride, token_rows, k, out, out_stride, ahead)`, addresses and bytes.
    """

    @intrinsic
    def tile(_context: Any, _w: Any, _dw: Any, _tokens: Any, _k: Any, _out: Any, _dout: Any, _ahead: Any) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            weight, stride, tokens, k, out, out_stride, ahead = args
            emit = _Tile(b, columns, kind)
            weights = [b.add(weight, b.mul(stride, ir.Constant(_I64, r))) for r in range(rows)]
            acc = emit.dots(weights, ahead, tokens, k)
            sums = emit.sums([acc[r][j] for j in range(columns) for r in range(rows)])
            emit.store(sums, rows, out, out_stride)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def swiglu_tile(kind: int, rows: int, columns: int) -> Any:
    """`out[j, r] = silu(dot(gate row r, token row j)) * dot(up row r, token row j)`, stride in bytes.

    Call it as `(gate, up, weight_stride, token_rows, k, out, out_stride, ahead)`, addresses and bytes.
    """

    @intrinsic
    def tile(
        _context: Any, _gate: Any, _up: Any, _dw: Any, _tokens: Any, _k: Any, _out: Any, _dout: Any, _ahead: Any
    ) -> Any:
        def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            gate, up, stride, tokens, k, out, out_stride, ahead = args
            emit = _Tile(b, columns, kind)
            weights = [b.add(w, b.mul(stride, ir.Constant(_I64, r))) for w in (gate, up) for r in range(rows)]
            acc = emit.dots(weights, ahead, tokens, k)
            order = [(r, j) for j in range(columns) for r in range(rows)]
            gates, ups = emit.sums([acc[r][j] for r, j in order]), emit.sums([acc[rows + r][j] for r, j in order])
            emit.store([b.fmul(emit.silu(g), u) for g, u in zip(gates, ups, strict=True)], rows, out, out_stride)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile
