"""The CPU kernel that an expert worker answers a router with: from one ring into another, request after request.

Imported only to build it (see `library`): numba is here.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu import arguments
from workers.kernels.cpu.arguments import Experts, ReadRequest, RingServe
from workers.kernels.cpu.compiled.answer import read
from workers.kernels.cpu.compiled.jit import as_int64, call, load_int32, reader
from workers.kernels.cpu.compiled.ring import (
    await_message,
    clock,
    find,
    following,
    mean,
    room,
    run_team,
    say,
    try_lock,
    unlock,
)
from workers.kernels.cpu.kernel import HEAD
from workers.kernels.message import COMPUTE_NS, HEADER_BYTES, N_PAIRS, RING_DONE, RING_SENT

_serve = reader(arguments.RingServe)
_RECEIVED, _FREED, _CLOSED, _WAITED_NS = (
    HEAD + RingServe._fields.index(name) for name in ("received", "freed", "closed", "waited_ns")
)
_MESSAGE, _BYTES, _READ_PAIRS, _REPLY = (
    HEAD + ReadRequest._fields.index(name) for name in ("message", "n_bytes", "n_pairs", "reply")
)
_Y = HEAD + Experts._fields.index("y")
_FOREVER = 1 << 62


@numba.njit
def _answer(a, message, n_bytes, n_pairs, reply, team):  # type: ignore[no-untyped-def]
    """Whether the request was answered; see `read`."""
    request, products = as_int64(a.read), as_int64(a.experts)
    request[0] = 0
    request[_MESSAGE], request[_BYTES], request[_READ_PAIRS], request[_REPLY] = message, n_bytes, n_pairs, reply
    read(a.read)
    if request[0] == 0:
        return False
    products[0] = products[1] = products[2] = products[3] = 0
    products[_Y] = reply + HEADER_BYTES
    if team > 1:
        products[3] = a.barrier
        run_team(a.system, a.products, a.experts, team)
    else:
        call(a.products, a.experts)
    return True


@numba.njit
def _count(a, n_pairs, spent_ns):  # type: ignore[no-untyped-def]
    counts, size = as_int64(a.counts), 0
    while size < a.n_sizes - 1 and n_pairs > 1 << size:
        size += 1
    counts[0], counts[1], counts[2 + size] = counts[0] + n_pairs, counts[1] + spent_ns, counts[2 + size] + 1


def ring_serve(args: int) -> None:
    """See `arguments.RingServe`."""
    a, me = _serve(args), as_int64(args)
    while True:
        received = me[_RECEIVED]
        came, waited_ns = await_message(a.requests, received, me[_WAITED_NS], _FOREVER, args + 8 * _CLOSED, a.system)
        if not came:
            return
        me[_WAITED_NS] = mean(me[_WAITED_NS], waited_ns)
        message, n_bytes, asked = find(a.requests, received, a.ring_bytes)
        if message == 0 or asked == 0:
            return
        sent, done = load_int32(a.replies + RING_SENT), load_int32(a.requests + RING_DONE)
        n_pairs = load_int32(message + N_PAIRS)
        if (sent - done) & 0xFFFFFFFF > (sent - me[_FREED]) & 0xFFFFFFFF or not 0 < n_pairs <= a.most_pairs:
            return
        reply_bytes = HEADER_BYTES + 4 * n_pairs * a.d
        begin = room(a.replies, done, reply_bytes, a.ring_bytes)
        if begin == 0 or not try_lock(a.system, a.computing):
            return
        is_answered = try_lock(a.system, a.holding)
        if is_answered:
            began = clock(a.system)
            team = max(1, min(a.threads, a.cores // asked))
            is_answered = _answer(a, message, n_bytes, n_pairs, a.replies + begin, team)
            unlock(a.system, a.holding)
            if is_answered:
                spent_ns = clock(a.system) - began
                as_int64(a.replies + begin)[COMPUTE_NS // 8] = spent_ns
                _count(a, n_pairs, spent_ns)
        unlock(a.system, a.computing)
        if not is_answered:
            return
        me[_RECEIVED], me[_FREED] = following(received), done
        say(a.replies, begin, reply_bytes, 1, a.system)


KERNELS = (ring_serve,)
