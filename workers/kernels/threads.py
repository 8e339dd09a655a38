"""CPU threads: how many a process uses, what has to be in its environment for that, and running a kernel on them.

Kernels run on the OpenMP threads that torch itself uses: a second pool beside it would spin on the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

import torch

# Work below this many bytes of weights is done before another thread has woken up.
PARALLEL_BYTES = 1 << 17

_GLIBC_TUNABLES = ":".join(
    (
        # Large buffers come from the heap and stay there: mapping and zeroing fresh pages for each message of a
        # megabyte costs as much as sending it.
        "glibc.malloc.mmap_threshold=4294967295",
        "glibc.malloc.trim_threshold=4294967295",
        "glibc.malloc.top_pad=268435456",
    )
)


def process_environment(threads: int) -> dict[str, str]:
    """What has to be in the environment of a process before it starts, so that it computes on `threads` threads.

    OpenMP reads these once, when torch is imported.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": _GLIBC_TUNABLES,
    }
    if threads > 1:
        # Idle threads spin about 0.1 ms for the next kernel of the step, then sleep: a process that waits for the
        # others must leave them the cores.
        environment["GOMP_SPINCOUNT"] = "20000"
    return environment


def set_threads(threads: int) -> None:
    """Compute on `threads` threads from now on: torch's operators and the kernels of this package."""
    torch.set_num_threads(threads)


@functools.cache
def _openmp() -> tuple[Callable[[int, int, int, int], None] | None, int]:
    """GOMP_parallel and the address of GOMP_barrier, of the OpenMP runtime that torch is linked with."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            library = ctypes.CDLL(os.fspath(path))
            try:
                parallel, barrier = library.GOMP_parallel, library.GOMP_barrier
            except AttributeError:
                break
            parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            parallel.restype = None
            return parallel, ctypes.cast(barrier, ctypes.c_void_p).value or 0
    return None, 0


def available() -> int:
    """How many threads `run` may use."""
    return torch.get_num_threads() if _openmp()[0] is not None else 1


def float_bits(value: float) -> int:
    """A float32 as the integer a kernel takes it for."""
    return int.from_bytes(struct.pack("<f", value), "little")


class Kernel:
    """Machine code `void f(int64 *args)`, run by every thread of a team at once; the threads share out the work.

    args[0] and args[1] count the units taken in a first and second phase; args[2] is the address of the barrier
    between the two, or 0 in a team of one.
    """

    def __init__(self, compile_: Callable[[], int]) -> None:
        self._compile = compile_

    @functools.cached_property
    def _address(self) -> int:
        return self._compile()

    @functools.cached_property
    def _call(self) -> Callable[[int], None]:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, threads: int, *values: int) -> None:
        """Run on `threads` threads with `values` as args[3:]. Releases the GIL."""
        if threads > 1:
            parallel, barrier = _openmp()
            assert parallel is not None
            args = array("q", (0, 0, barrier, *values))
            parallel(self._address, args.buffer_info()[0], threads, 0)
        else:
            args = array("q", (0, 0, 0, *values))
            self._call(args.buffer_info()[0])
