"""The CPU kernels of a ring in shared memory: say that a message is there, wait for one.

Imported only to build them (see `native`): numba is here. The order in which the other process sees the writes is what
makes a ring, so these are atomic, and a futex wakes and waits without the interpreter.
"""

from __future__ import annotations

from workers.kernels.jit import as_int64, load_int32, store_int32, system_call
from workers.kernels.native import RING_ENTRIES, RING_ENTRY_BYTES, RING_MESSAGES, RING_SENT

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


def ring_publish(args: int) -> None:
    """Note a message in the control page a[4] and wake who waits: a[5] where it begins, a[6] its bytes, a[7] how many
    workers were asked with it; a[8] the C library's `syscall`, a[9] the number of futex."""
    a = as_int64(args)
    word = a[4] + RING_SENT
    sent = load_int32(word)
    entry = as_int64(a[4] + RING_ENTRIES + RING_ENTRY_BYTES * (sent & (RING_MESSAGES - 1)))
    entry[0], entry[1], entry[2] = a[5], a[6], a[7]
    store_int32(word, sent + 1)
    system_call(a[8], a[9], word, _FUTEX_WAKE, 1, 0)


def ring_wait(args: int) -> None:
    """Sleep until the word at a[4] is no longer a[5], or the time a[6] points to is over; args[0] becomes the word.

    a[7] `syscall`, a[8] the number of futex.
    """
    a = as_int64(args)
    word, known = a[4], a[5]
    if load_int32(word) == known:
        system_call(a[7], a[8], word, _FUTEX_WAIT, known, a[6])
    a[0] = load_int32(word)


def ring_wake(args: int) -> None:
    """Wake who waits for the word at a[4]; a[5] `syscall`, a[6] the number of futex."""
    a = as_int64(args)
    system_call(a[5], a[6], a[4], _FUTEX_WAKE, 1, 0)


KERNELS = (ring_publish, ring_wait, ring_wake)
