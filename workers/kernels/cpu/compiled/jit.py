"""What numba lacks for the CPU kernels: named arguments, addresses as arrays, atomic counters, calls of machine code.

Addresses are int64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import numba
import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils

from workers.kernels.cpu.compiled import vector
from workers.kernels.cpu.kernel import HEAD

intrinsic: Callable[[Callable[..., Any]], Any] = numba.extending.intrinsic

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


@intrinsic
def take(_context: Any, _address: Any) -> Any:
    """Add one to the int64 at `address`, atomically; return what it was."""

    def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def wait_for_team(_context: Any, _barrier: Any) -> Any:
    """Call the barrier at the address; nothing for address 0."""

    def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        with b.if_then(b.icmp_signed("!=", args[0], ir.Constant(_I64, 0))):
            b.call(b.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call(_context: Any, _function: Any, _args: Any) -> Any:
    """Call the kernel at the address with the address of its arguments."""

    def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        b.call(b.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [_I64]).as_pointer()), [args[1]])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_int32(_context: Any, _address: Any) -> Any:
    """The int32 at an address that another process writes, and all that it wrote before. Read once: a plain load could
    be repeated after its value was checked."""

    def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], _I32.as_pointer()), "acquire", 4)

    return types.int32(types.int64), codegen


@intrinsic
def store_int32(_context: Any, _address: Any, _value: Any) -> Any:
    """Write the int32 at an address, after everything that was written before."""

    def codegen(ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        value = args[1] if args[1].type == _I32 else b.trunc(args[1], _I32)
        b.store_atomic(value, b.inttoptr(args[0], _I32.as_pointer()), "release", 4)
        return ctx.get_dummy_value()

    return types.void(types.int64, _value), codegen


@intrinsic
def call_c(_context: Any, _function: Any, _a: Any, _b: Any, _c: Any, _d: Any, _e: Any) -> Any:
    """Call the C function at an address with five integers; what it returns, of which an int is the lower half."""

    def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        function, *values = args
        kind, none = ir.FunctionType(_I64, [_I64] * 7), ir.Constant(_I64, 0)
        return b.call(b.inttoptr(function, kind.as_pointer()), [*values, none, none])

    return types.int64(*[types.int64] * 6), codegen


@intrinsic
def now_ns(_context: Any, _clock_gettime: Any) -> Any:
    """Nanoseconds of the monotonic clock, by the C function at an address."""

    def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
        time = cgutils.alloca_once(b, ir.ArrayType(_I64, 2))
        kind = ir.FunctionType(_I32, [_I32, time.type])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [ir.Constant(_I32, 1), time])
        seconds, rest = (b.load(cgutils.gep_inbounds(b, time, 0, i)) for i in (0, 1))
        return b.add(b.mul(seconds, ir.Constant(_I64, 1_000_000_000)), rest)

    return types.int64(types.int64), codegen


def _pointer(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def cast(_context: Any, _address: Any) -> Any:
        def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], llvm_type.as_pointer())

        return types.CPointer(numba_type)(types.int64), codegen

    return cast


as_int64 = _pointer(types.int64, _I64)  #: The address as a C array of int64.
as_int32 = _pointer(types.int32, _I32)  #: The address as a C array of int32.
as_float32 = _pointer(types.float32, _F32)  #: The address as a C array of float32.


@intrinsic
def bits_as_float32(_context: Any, bits: Any) -> Any:
    """The float32 whose bits are the lower 32 of an integer."""

    def codegen(_ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        narrow = args[0] if sig.args[0].bitwidth == 32 else b.trunc(args[0], _I32)
        return b.bitcast(narrow, _F32)

    return types.float32(bits), codegen


def reader(fields: Any) -> Any:
    """A function that gives the arguments of a kernel, by the names that `cpu.arguments` defines."""
    names = [
        f"bits_as_float32(a[{HEAD + i}])" if kind is float else f"a[{HEAD + i}]"
        for i, kind in enumerate(get_type_hints(fields).values())
    ]
    scope = {"as_int64": as_int64, "bits_as_float32": bits_as_float32, "Fields": fields}
    exec(f"def read(args):\n    a = as_int64(args)\n    return Fields({', '.join(names)})", scope)
    return numba.njit(scope["read"])


def _unary(emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def function(_context: Any, _x: Any) -> Any:
        def codegen(_ctx: Any, b: Any, _sig: Any, args: Any) -> Any:
            return emit(b, args[0])

        return types.float32(types.float32), codegen

    return function


def _emit_sqrt(b: Any, x: Any) -> Any:
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(_F32, [_F32]), "llvm.sqrt.f32"), [x])


# math's would be calls of the C library, which no loop around them survives.
exp = _unary(vector.exp)
sqrt = _unary(_emit_sqrt)
