"""What kernels call of the C library and of OpenMP, and where that is."""

from __future__ import annotations

import functools
import platform
from array import array
from ctypes import CDLL, c_void_p, cast
from typing import Any

from workers.kernels.cpu import kernel
from workers.kernels.cpu.arguments import System
from workers.kernels.cpu.immortal import immortal

#: The number of the system call.
_FUTEX = {"x86_64": 202}.get(platform.machine(), 98)
#: How long a kernel sleeps at most, as a timespec: a wake that comes just before the sleep is lost.
_NAP = immortal(array("q", (0, 50_000_000)))


@functools.cache
def _system() -> array[int]:
    library = CDLL(None)
    values = System(
        syscall=_address(library.syscall),
        clock_gettime=_address(library.clock_gettime),
        trylock=_address(library.pthread_mutex_trylock),
        unlock=_address(library.pthread_mutex_unlock),
        parallel=kernel.parallel(),
        futex=_FUTEX,
        nap=_NAP.buffer_info()[0],
    )
    return immortal(array("q", values))


def _address(function: Any) -> int:
    return cast(function, c_void_p).value or 0


def system() -> int:
    """The address of a `System`."""
    return _system().buffer_info()[0]
