"""The CPU kernels of a ring in shared memory: say that a message is there, sleep until one is.

Imported only to build them (see `library`): numba is here. What the other process may see, and in which order, is what
makes a ring, so its count is read and written atomically.
"""

from __future__ import annotations

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_int64, load_int32, reader, store_int32, system_call
from workers.kernels.message import RING_ENTRIES, RING_ENTRY_BYTES, RING_MESSAGES

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_publish, _sleep = reader(arguments.RingPublish), reader(arguments.RingSleep)


def ring_publish(args: int) -> None:
    """See `arguments.RingPublish`."""
    a = _publish(args)
    sent = load_int32(a.sent)
    entry = as_int64(a.page + RING_ENTRIES + RING_ENTRY_BYTES * (sent & (RING_MESSAGES - 1)))
    entry[0], entry[1], entry[2] = a.begin, a.n_bytes, a.asked
    store_int32(a.sent, sent + 1)
    system_call(a.syscall, a.futex, a.sent, _FUTEX_WAKE, 1, 0)


def ring_sleep(args: int) -> None:
    """See `arguments.RingSleep`."""
    a = _sleep(args)
    if load_int32(a.sent) == a.known:
        system_call(a.syscall, a.futex, a.sent, _FUTEX_WAIT, a.known, a.nap)
    as_int64(args)[0] = load_int32(a.sent)


def ring_rouse(args: int) -> None:
    """Wake who sleeps; the arguments are those of `ring_sleep`."""
    a = _sleep(args)
    system_call(a.syscall, a.futex, a.sent, _FUTEX_WAKE, 1, 0)


KERNELS = (ring_publish, ring_sleep, ring_rouse)
