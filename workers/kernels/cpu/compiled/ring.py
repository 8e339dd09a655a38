"""The CPU kernels of a ring in shared memory: find room in it, say that a message is there, wait until one is.

Imported only to build them (see `library`): numba is here. What the other process may see, and in which order, is what
makes a ring, so its count is read and written atomically.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu import arguments
from workers.kernels.cpu.arguments import System
from workers.kernels.cpu.compiled.jit import as_int64, call_c, load_int32, now_ns, reader, store_int32
from workers.kernels.message import (
    HEADER_BYTES,
    RING_ALIGN,
    RING_DATA,
    RING_ENTRIES,
    RING_ENTRY_BYTES,
    RING_MESSAGES,
    RING_SENT,
)

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_publish, _room, _sleep = reader(arguments.RingPublish), reader(arguments.RingRoom), reader(arguments.RingSleep)
_SYSCALL, _CLOCK_GETTIME, _TRYLOCK, _UNLOCK, _PARALLEL, _FUTEX, _NAP = range(len(System._fields))
#: A thread that would be woken sooner than it takes to put it to sleep and to wake it looks for so long first: about
#: what that takes. And only where it has been so of late, as what computes meanwhile may need the core.
_SPIN_NS = 25_000


@numba.njit
def clock(system):  # type: ignore[no-untyped-def]
    """Nanoseconds."""
    return now_ns(as_int64(system)[_CLOCK_GETTIME])


@numba.njit
def try_lock(system, mutex):  # type: ignore[no-untyped-def]
    """Whether a `Mutex` is this thread's now."""
    return call_c(as_int64(system)[_TRYLOCK], mutex, 0, 0, 0, 0) & 0xFFFFFFFF == 0


@numba.njit
def unlock(system, mutex):  # type: ignore[no-untyped-def]
    """It is nobody's."""
    call_c(as_int64(system)[_UNLOCK], mutex, 0, 0, 0, 0)


@numba.njit
def run_team(system, kernel, args, team):  # type: ignore[no-untyped-def]
    """Run a kernel on the threads of a team of more than one."""
    call_c(as_int64(system)[_PARALLEL], kernel, args, team, 0, 0)


@numba.njit
def _wake(system, count):  # type: ignore[no-untyped-def]
    call_c(as_int64(system)[_SYSCALL], as_int64(system)[_FUTEX], count, _FUTEX_WAKE, 1, 0)


@numba.njit
def _nap(system, count, known):  # type: ignore[no-untyped-def]
    call_c(as_int64(system)[_SYSCALL], as_int64(system)[_FUTEX], count, _FUTEX_WAIT, known, as_int64(system)[_NAP])


@numba.njit
def following(count):  # type: ignore[no-untyped-def]
    """One more, as an int32."""
    return ((count + 1 + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


@numba.njit
def _entry(page, number):  # type: ignore[no-untyped-def]
    return page + RING_ENTRIES + RING_ENTRY_BYTES * (number & (RING_MESSAGES - 1))


@numba.njit
def say(page, begin, n_bytes, asked, system):  # type: ignore[no-untyped-def]
    """See `arguments.RingPublish`."""
    sent = load_int32(page + RING_SENT)
    entry = as_int64(_entry(page, sent))
    entry[0], entry[1], entry[2] = begin, n_bytes, asked
    store_int32(page + RING_SENT, sent + 1)
    _wake(system, page + RING_SENT)


@numba.njit
def room(page, freed, n_bytes, ring_bytes):  # type: ignore[no-untyped-def]
    """See `arguments.RingRoom`. Where messages lie is in the control page, which nobody else writes to."""
    sent = load_int32(page + RING_SENT)
    n_taken = (sent - freed) & 0xFFFFFFFF
    if n_taken >= RING_MESSAGES:
        return 0
    at, is_free = RING_DATA, False
    while not is_free:
        is_free = True
        for number in range(sent - n_taken, sent):
            entry = as_int64(_entry(page, number))
            if at < entry[0] + entry[1] and entry[0] < at + n_bytes:
                at, is_free = (entry[0] + entry[1] + RING_ALIGN - 1) & -RING_ALIGN, False
    return at if at + n_bytes <= ring_bytes else 0


@numba.njit
def find(page, number, ring_bytes):  # type: ignore[no-untyped-def]
    """The message of that number in a ring that a peer writes: its address, its bytes, how many were asked. Address 0:
    the control page makes no sense. It is read once, as the peer may change it at any time."""
    entry = _entry(page, number)
    begin, n_bytes, asked = load_int32(entry), load_int32(entry + 8), load_int32(entry + 16)
    if load_int32(entry + 4) != 0 or load_int32(entry + 12) != 0 or load_int32(entry + 20) != 0:
        return 0, 0, 0
    if begin < RING_DATA or begin & (RING_ALIGN - 1) != 0 or n_bytes < HEADER_BYTES or begin > ring_bytes - n_bytes:
        return 0, 0, 0
    return page + begin, n_bytes, asked if 0 < asked < 1 << 16 else 0


@numba.njit
def await_message(page, known, mean_ns, limit_ns, stop, system):  # type: ignore[no-untyped-def]
    """Wait until a peer has sent another number of messages than is known; false: the int32 at `stop` is not 0, or so
    many nanoseconds have passed. And how many did. mean_ns: of such waits until now."""
    sent, began, spent = page + RING_SENT, clock(system), 0
    while load_int32(stop) == 0:
        if load_int32(sent) != known:
            return True, clock(system) - began
        spent = clock(system) - began
        if spent > limit_ns:
            break
        if mean_ns > 2 * _SPIN_NS or spent > _SPIN_NS:
            _nap(system, sent, known)
    return False, spent


@numba.njit
def mean(mean_ns, spent_ns):  # type: ignore[no-untyped-def]
    """The mean of the last waits with one more."""
    return mean_ns + (spent_ns - mean_ns) // 8


def ring_publish(args: int) -> None:
    """See `arguments.RingPublish`."""
    a = _publish(args)
    say(a.page, a.begin, a.n_bytes, a.asked, a.system)


def ring_room(args: int) -> None:
    """See `arguments.RingRoom`."""
    a = _room(args)
    as_int64(args)[0] = room(a.page, a.freed, a.n_bytes, a.ring_bytes)


def ring_sleep(args: int) -> None:
    """See `arguments.RingSleep`."""
    a = _sleep(args)
    if load_int32(a.sent) == a.known:
        _nap(a.system, a.sent, a.known)
    as_int64(args)[0] = load_int32(a.sent)


def ring_rouse(args: int) -> None:
    """Wake who sleeps; the arguments are those of `ring_sleep`."""
    a = _sleep(args)
    _wake(a.system, a.sent)


KERNELS = (ring_publish, ring_room, ring_sleep, ring_rouse)
