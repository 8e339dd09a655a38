"""CPU threads: how many a process uses, and what has to be in its environment for that."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

_GLIBC_TUNABLES = ":".join(
    (
        # Large buffers come from the heap and stay there: mapping and zeroing fresh pages for each message of a
        # megabyte costs as much as sending it.
        "glibc.malloc.mmap_threshold=4294967295",
        "glibc.malloc.trim_threshold=4294967295",
        "glibc.malloc.top_pad=268435456",
    )
)


def worker_threads(cores: int, workers: int) -> int:
    """CPU threads of each of `workers` expert workers on one machine: an even share, but two if every one has a core.

    A decoding token often finds all its experts on one worker, which then has the memory bandwidth of one core while
    the others sleep; a second thread costs little as long as idle threads sleep (`process_environment`).
    """
    return max(cores // workers, min(2, cores) if workers <= cores else 1)


def process_environment(threads: int) -> dict[str, str]:
    """What has to be in the environment of a process before it starts, so that it computes on `threads` threads.

    OpenMP and gRPC read these once, when they are imported.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": _GLIBC_TUNABLES,
        # For the generation service: gRPC then reads a socket in the thread that waits for the message rather than in
        # one of a pool of its own. A small message between gateway and router and back takes a fifth less.
        "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    }
    if threads > 1:
        # Idle threads spin about 0.1 ms for the next kernel of the step, then sleep. OpenMP's own 20 ms is as good
        # on an idle machine, but where anything else wants a core it keeps it from the very thread that is awaited:
        # with two threads on two busy cores a step took four times as long.
        environment["GOMP_SPINCOUNT"] = "2000"
    return environment


def limit_threads(threads: int) -> None:
    """Compute on `threads` threads from now on what the calling thread computes; the others are not concerned."""
    _set_num_threads()(threads)


@functools.cache
def _set_num_threads() -> Callable[[int], None]:
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(os.fspath(path)).omp_set_num_threads
    except (OSError, AttributeError):  # another platform's torch
        return lambda threads: None
    function.argtypes, function.restype = (ctypes.c_int,), None
    return cast(Callable[[int], None], function)


def set_threads(threads: int) -> None:
    """Compute on `threads` threads from now on: torch's operators and the kernels of this package."""
    import torch  # here, because OpenMP reads the environment above when torch is imported

    torch.set_num_threads(threads)
