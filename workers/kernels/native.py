"""The compiled CPU kernels: loaded without the compiler, run on torch's own threads, recorded to be run again.

Kernels run on the OpenMP threads that torch itself uses: a second pool beside it would spin on the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import subprocess
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

import torch

from workers.kernels.library import library

#: Up to this many rows a product is bound by reading the weights, and the streaming kernels beat a BLAS.
FEW_ROWS = 32
#: More rows than there are: for what has no limit.
MANY_ROWS = 1 << 62
#: Weight rows that one thread takes at a time.
UNIT = 64
#: Columns of a layer's combined output that one thread takes at a time.
DOWN_UNIT = 32
#: How weights are stored, as the kernels are told it.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
#: Of the header of a message of `workers.wire`, which some kernels read and write.
HEADER_BYTES = 72
#: Where it says how many pairs there are.
N_PAIRS = struct.Struct("<48xI")
#: Where things are in the control page of a ring in shared memory (`transport.shm.ring`).
RING_SENT, RING_ENTRIES, RING_ENTRY_BYTES, RING_MESSAGES = 64, 1024, 32, 64
#: Work on fewer bytes than this is done before another thread has woken up.
PARALLEL_BYTES = 1 << 17

# Of the widest registers that the kernels are made for.
_LANES, _PANEL = 16, 32
_log = logging.getLogger(__name__)


@functools.cache
def usable() -> bool:
    """Whether the kernels could be built and loaded here. If not, said once in the log, everything is plain torch."""
    try:
        library()
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        _log.warning("the CPU kernels are not available, plain torch is used instead: %s", error)
        return False
    return True


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernels compute with weights stored as `dtype` (rows are always float32)."""
    return dtype in KINDS and usable() and (dtype is not torch.float16 or widens_float16())


@functools.cache
def widens_float16() -> bool:
    """Whether the processor makes float32 of float16; bfloat16 is a shift anywhere."""
    import llvmlite.binding as llvm

    return not llvm.get_process_triple().startswith("x86") or bool(llvm.get_host_cpu_features().get("f16c"))


def team(work_bytes: int) -> int:
    """How many threads should share work on this many bytes."""
    return torch.get_num_threads() if work_bytes >= PARALLEL_BYTES and _openmp()[0] is not None else 1


def barrier(threads: int) -> int:
    """What a team of so many threads finds in args[3]."""
    return _openmp()[1] if threads > 1 else 0


def float_bits(value: float) -> int:
    """A float32 as the integer a kernel takes it for."""
    return int.from_bytes(struct.pack("<f", value), "little")


class Kernel:
    """Machine code `void f(int64 *args)`, run by every thread of a team at once; the threads share out the work.

    args[0] and args[1] count the units taken in a first and second phase, args[2] the threads that have asked for a
    number; args[3] is the address of the barrier between the phases, or 0 in a team of one.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @functools.cached_property
    def address(self) -> int:
        return int(library().get_function_address(f"expertmesh_{self.name}"))

    @functools.cached_property
    def _call(self) -> Callable[[int], None]:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, threads: int, *values: int) -> None:
        """Run on `threads` threads with `values` as args[4:], or record that for a tape. Releases the GIL."""
        recording: Tape | None = getattr(_thread, "tape", None)
        if recording is not None:
            recording.add(self, threads, values)
        else:
            self.run(threads, array("q", (0, 0, 0, barrier(threads), *values)))

    def run(self, threads: int, args: array[int]) -> None:
        """Run on `threads` threads with all of `args`, which may be looked at and used again. Never records."""
        if threads > 1:
            parallel, _ = _openmp()
            assert parallel is not None
            parallel(self.address, args.buffer_info()[0], threads, 0)
        else:
            self._call(args.buffer_info()[0])

    @functools.cached_property
    def _call_with_gil(self) -> Callable[[int], None]:
        return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def alone(self, *values: int) -> int:
        """Run on the calling thread and never record; returns what the kernel leaves in args[0].

        The GIL is kept: for work of microseconds, waiting to get it back would take longer.
        """
        return self.run_alone(array("q", (0, 0, 0, 0, *values)))

    def run_alone(self, args: array[int]) -> int:
        """`alone` with all of `args`, which may be looked at and used again."""
        self._call_with_gil(args.buffer_info()[0])
        return args[0]


class Tape:
    """Kernel calls recorded once and run again as one: on the same memory, one fork and join for all of them.

    Between `with tape:` the thread's kernel calls are noted, not run, so nothing there may read what a kernel writes
    (`hold` keeps the tensors alive that the calls point into). `run` repeats them in order.
    """

    def __init__(self) -> None:
        self._calls = array("q")
        self._args: list[array[int]] = []
        self._team = 1
        self._held: list[torch.Tensor] = []

    def __enter__(self) -> Tape:
        _thread.tape = self
        return self

    def __exit__(self, *_error: object) -> None:
        _thread.tape = None

    def add(self, kernel: Kernel, threads: int, values: tuple[int, ...]) -> None:
        """Note one call."""
        args = array("q", (0, 0, 0, barrier(threads), *values))
        self._args.append(args)
        self._calls.extend((kernel.address, args.buffer_info()[0], threads))
        self._team = max(self._team, threads)

    def hold(self, tensor: torch.Tensor) -> None:
        """Keep `tensor` as long as the tape."""
        self._held.append(tensor)

    def run(self) -> None:
        """Everything noted, in order. Not from two threads at once."""
        _run_tape(self._team, len(self._args), self._calls.buffer_info()[0])


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`torch.empty` for memory that a kernel is given: a tape that records the call keeps it."""
    tensor = torch.empty(shape, dtype=dtype)
    recording: Tape | None = getattr(_thread, "tape", None)
    if recording is not None:
        recording.hold(tensor)
    return tensor


def rows_apart(n_rows: int, n: int) -> torch.Tensor:
    """Room for [n_rows, n] float32, for the tiles of a panel: rows that begin a multiple of 4096 bytes apart would all
    lie in the few places that a cache has for such addresses."""
    return empty(n_rows, n + (_LANES if 4 * n % 4096 == 0 else 0))[:, :n]


def panels(team: int, k: int) -> torch.Tensor:
    """Room for a panel of weight rows of length k for each thread; see `panel`. Float32 [team, ...]."""
    return empty(team, _PANEL * (-(-k // _LANES) * _LANES))


def where(scratch: torch.Tensor | None) -> tuple[int, int]:
    """Where scratch with a row for each thread begins, and the bytes from one to the next; zeros for none."""
    return (0, 0) if scratch is None else (scratch.data_ptr(), 4 * scratch.stride(0))


_thread = threading.local()

linear = Kernel("linear")
plan = Kernel("plan")
experts_pairs = Kernel("experts_pairs")
experts_combined = Kernel("experts_combined")
combine = Kernel("combine")
silu_mul = Kernel("silu_mul")
rms_norm = Kernel("rms_norm")
add_rms_norm = Kernel("add_rms_norm")
gate_top_k = Kernel("gate_top_k")
rotary_write = Kernel("rotary_write")
paged_attention = Kernel("paged_attention")
dispatch_plan = Kernel("dispatch_plan")
weighted_sum = Kernel("weighted_sum")
weigh_rows = Kernel("weigh_rows")
read_request = Kernel("read_request")
ring_publish = Kernel("ring_publish")
ring_wait = Kernel("ring_wait")
ring_wake = Kernel("ring_wake")
_run_tape = Kernel("run_tape")


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
