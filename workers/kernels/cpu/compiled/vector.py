"""LLVM code on the host's vector registers: loads, shuffles and exp.

Addresses are int64; one vector is LANES numbers.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

from workers.kernels.cpu.kernel import BFLOAT16, FLOAT32

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _vector_registers() -> tuple[int, int]:
    """(float32 lanes of a vector register, number of registers) of the host."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx2") and features.get("fma"):
        return 8, 16
    return 4, 16 if llvmlite.binding.get_process_triple().startswith("x86_64") else 32


LANES, REGISTERS = _vector_registers()


class Vectors:
    """Emits code on vectors at the builder's place."""

    def __init__(self, builder: Any) -> None:
        self.b = builder
        self.vector = ir.VectorType(F32, LANES)
        self.zero = ir.Constant(self.vector, [0.0] * LANES)

    def at(self, address: Any, type_: Any) -> Any:
        return self.b.inttoptr(address, type_.as_pointer())

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, list(arguments)), name)

    def fma(self, one: Any, other: Any, added: Any) -> Any:
        """`one * other + added`, rounded once."""
        function = self.function(f"llvm.fma.v{LANES}f32", self.vector, *[self.vector] * 3)
        return self.b.call(function, [one, other, added])

    def shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """The lanes of both vectors, numbered through, that `lanes` names."""
        return self.b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def anew(self, value: Any) -> Any:
        """The same int64, of which the compiler does not know that it is: what is loaded by it is loaded again."""
        return self.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], True)

    def all_lanes(self, value: Any) -> Any:
        """A vector of LANES times a number."""
        vector = ir.VectorType(value.type, LANES)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.shuffle(first, first, [0] * LANES)

    def first_lanes(self, count: Any) -> Any:
        """The mask of the lanes below `count`, an int64."""
        lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
        return self.b.icmp_signed("<", lanes, self.all_lanes(self.b.trunc(count, I32)))

    def load(self, kind: int, address: Any, mask: Any = None) -> Any:
        """LANES numbers of a kind as float32, which is exact; those outside the mask are zero and not read."""
        type_ = self.vector if kind == FLOAT32 else ir.VectorType(I16, LANES)
        pointer = self.at(address, type_)
        if mask is None:
            stored = self.b.load(pointer, align=2)
        else:
            name = f"llvm.masked.load.v{LANES}{'f32' if kind == FLOAT32 else 'i16'}.p0"
            load = self.function(name, type_, pointer.type, I32, mask.type, type_)
            stored = self.b.call(load, [pointer, I32(2), mask, ir.Constant(type_, None)])
        if kind == FLOAT32:
            return stored
        if kind == BFLOAT16:  # the upper half of a float32
            words = self.b.zext(stored, ir.VectorType(I32, LANES))
            return self.b.bitcast(self.b.shl(words, ir.Constant(words.type, [16] * LANES)), self.vector)
        return self.b.fpext(self.b.bitcast(stored, ir.VectorType(ir.HalfType(), LANES)), self.vector)

    def store(self, vector: Any, address: Any, mask: Any = None) -> None:
        """Write LANES float32, or those of the mask."""
        pointer = self.at(address, self.vector)
        if mask is None:
            self.b.store(vector, pointer, align=4)
        else:
            store = self.function(
                f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), self.vector, pointer.type, I32, mask.type
            )
            self.b.call(store, [vector, pointer, I32(4), mask])


def exp(b: Any, x: Any) -> Any:
    """exp of a float32 or of a vector of them, within 2 ulp where it is between exp(-87) and exp(88), which it is cut
    off at: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2]. Written out, so that loops around it become
    vectors, and a number gives the same bits alone and in a vector."""
    lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
    whole = ir.VectorType(I32, lanes) if lanes else I32

    def const(type_: Any, value: float) -> Any:
        return ir.Constant(type_, [value] * lanes if lanes else value)

    def call(name: str, *values: Any) -> Any:
        full = f"llvm.{name}.{f'v{lanes}f32' if lanes else 'f32'}"
        return b.call(
            cgutils.get_or_insert_function(b.module, ir.FunctionType(x.type, [x.type] * len(values)), full), values
        )

    x = call("maxnum", call("minnum", x, const(x.type, 88.0)), const(x.type, -87.0))
    power = call("rint", b.fmul(x, const(x.type, 1.4426950216293335)))
    rest = call("fma", power, const(x.type, -0.693359375), x)
    rest = call("fma", power, const(x.type, 2.12194442e-4), rest)
    value = const(x.type, 1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        value = call("fma", value, rest, const(x.type, 1 / factorial))
    biased = b.add(b.fptosi(power, whole), const(whole, 127))
    return b.fmul(value, b.bitcast(b.shl(biased, const(whole, 23)), x.type))
