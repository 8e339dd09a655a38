"""Calls of the compiled kernels, on torch's own OpenMP threads: a second pool would spin on the same cores."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch

from workers.kernels.cpu import arguments
from workers.kernels.cpu.library import library

#: How weights are stored, as the kernels are told it.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
#: Work on fewer bytes than this is done before another thread has woken up.
PARALLEL_BYTES = 1 << 17
#: What comes before a kernel's own arguments: units taken in a first and in a second phase, threads that have asked for
#: a number, and the address of the barrier between the phases, or 0 in a team of one.
HEAD = 4

Values = TypeVar("Values", bound=NamedTuple)


@functools.cache
def widens_float16() -> bool:
    """Whether the processor makes float32 of float16; bfloat16 is a shift anywhere."""
    import llvmlite.binding as llvm

    return not llvm.get_process_triple().startswith("x86") or bool(llvm.get_host_cpu_features().get("f16c"))


@functools.cache
def kinds() -> dict[torch.dtype, int]:
    """What values of weights the kernels read, and how they are told it."""
    return {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16} | ({torch.float16: FLOAT16} if widens_float16() else {})


def team(work_bytes: int) -> int:
    """How many threads should share work on this many bytes."""
    return torch.get_num_threads() if work_bytes >= PARALLEL_BYTES and _openmp()[0] is not None else 1


def barrier(team: int) -> int:
    """The address of what the threads of a team wait at for each other; 0: there is only one."""
    return _openmp()[1] if team > 1 else 0


def parallel() -> int:
    """The address of what runs a kernel on a team; 0: there is none."""
    function, _ = _openmp()
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


class Kernel(Generic[Values]):
    """Machine code `void f(int64 *args)`, run by every thread of a team at once; the threads share out the work."""

    def __init__(self, name: str, fields: type[Values], *, brief: bool = False) -> None:
        """`brief`: one thread keeps the GIL, for waiting to get it back would take longer than the work."""
        self.name = name
        self._brief = brief
        self._floats = [i for i, kind in enumerate(get_type_hints(fields).values()) if kind is float]

    @functools.cached_property
    def address(self) -> int:
        return int(library().get_function_address(f"expertmesh_{self.name}"))

    def arguments(self, team: int, values: Values) -> array[int]:
        """What the machine code reads for one call."""
        if not self._floats:
            return array("q", (0, 0, 0, barrier(team), *values))
        numbers: list[Any] = [0, 0, 0, barrier(team), *values]
        for i in self._floats:
            numbers[HEAD + i] = int.from_bytes(struct.pack("<f", numbers[HEAD + i]), "little")
        return array("q", numbers)

    def __call__(self, team: int, values: Values) -> None:
        """Run on `team` threads."""
        self.run(team, self.arguments(team, values))

    def run(self, team: int, args: array[int]) -> None:
        """Run with all of `args`, which may be looked at and used again."""
        if team > 1:
            parallel, _ = _openmp()
            assert parallel is not None
            parallel(self.address, args.buffer_info()[0], team, 0)
        else:
            self._call(args.buffer_info()[0])

    @functools.cached_property
    def _call(self) -> Callable[[int], None]:
        function = ctypes.PYFUNCTYPE if self._brief else ctypes.CFUNCTYPE
        return function(None, ctypes.c_void_p)(self.address)


linear = Kernel("linear", arguments.Linear)
norm = Kernel("norm", arguments.Norm)
rotary_write = Kernel("rotary_write", arguments.RotaryWrite)
attention = Kernel("attention", arguments.Attention)
gate = Kernel("gate", arguments.Gate, brief=True)
gate_rows = Kernel("gate_rows", arguments.GateRows)
plan = Kernel("plan", arguments.Plan, brief=True)
pack_request = Kernel("pack_request", arguments.PackRequest, brief=True)
weighted_sum = Kernel("weighted_sum", arguments.WeightedSum, brief=True)
pairs = Kernel("pairs", arguments.Pairs, brief=True)
experts = Kernel("experts", arguments.Experts)
read_request = Kernel("read_request", arguments.ReadRequest, brief=True)
ring_publish = Kernel("ring_publish", arguments.RingPublish, brief=True)
ring_room = Kernel("ring_room", arguments.RingRoom, brief=True)
ring_sleep = Kernel("ring_sleep", arguments.RingSleep)
ring_rouse = Kernel("ring_rouse", arguments.RingSleep, brief=True)
ring_serve = Kernel("ring_serve", arguments.RingServe)
ring_ask = Kernel("ring_ask", arguments.RingAsk)
ring_collect = Kernel("ring_collect", arguments.RingCollect)
run_graph = Kernel("run_graph", arguments.RunGraph)


@functools.cache
def _openmp() -> tuple[Callable[[int, int, int, int], None] | None, int]:
    """GOMP_parallel and the address of GOMP_barrier, of the OpenMP runtime that torch is linked with."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(os.fspath(path))
        parallel, barrier = library.GOMP_parallel, library.GOMP_barrier
    except (OSError, AttributeError):  # another platform's torch: kernels run on the calling thread alone
        return None, 0
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel, ctypes.cast(barrier, ctypes.c_void_p).value or 0
