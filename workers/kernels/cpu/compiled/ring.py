"""The CPU kernels of a ring in shared memory: say that a message is there, sleep until one is; and the exchange of a
captured step over the rings of all workers.

Imported only to build them (see `library`): numba is here. What the other process may see, and in which order, is what
makes a ring, so its count is read and written atomically.
"""

from __future__ import annotations

import numba
import torch

from workers.kernels.cpu import arguments
from workers.kernels.cpu.arguments import PackRequest, RingPair, RingPublish, RingStep
from workers.kernels.cpu.compiled.dispatch import pack
from workers.kernels.cpu.compiled.jit import as_int32, as_int64, load_int32, reader, store_int32, system_call
from workers.kernels.message import (
    HEADER_BYTES,
    RING_ALIGN,
    RING_DATA,
    RING_DONE,
    RING_ENTRIES,
    RING_ENTRY_BYTES,
    RING_MESSAGES,
    RING_SENT,
)
from workers.wire import REPLY, REQUEST, first_word, place

_FUTEX_WAIT, _FUTEX_WAKE, _CLOCK_MONOTONIC = 0, 1, 1
_publish, _sleep = reader(arguments.RingPublish), reader(arguments.RingSleep)
_ask, _collect = reader(arguments.RingAsk), reader(arguments.RingCollect)
_ROUTER, _EPOCH, _STEP, _LIMIT_NS, _VOID = range(len(RingStep._fields))
_REQUESTS, _REPLIES, _RECEIVED, _ASKED, _LOST, _REQUEST_BYTES, _REPLY_BYTES, _WAITED_NS, _COMPUTE_NS = range(
    len(RingPair._fields)
)
_PAIR_BYTES = 8 * len(RingPair._fields)
_REQUEST_WORD, _REPLY_WORD = (first_word(kind, torch.float32) for kind in (REQUEST, REPLY))
_AT_ROUTER, _AT_EPOCH, _AT_STEP, _AT_PAYLOAD, _AT_COMPUTE_NS = (
    place(field) // 8 for field in ("router", "epoch", "step", "payload_bytes", "compute_ns")
)
_AT_LAYER, _AT_PART, _AT_ATTEMPT, _AT_TOKENS, _AT_PAIRS, _AT_WIDTH = (
    place(field) // 4 for field in ("layer", "part", "attempt", "n_tokens", "n_pairs", "width")
)


@numba.njit
def _say(a):  # type: ignore[no-untyped-def]
    """See `arguments.RingPublish`."""
    sent = load_int32(a.sent)
    entry = as_int64(a.page + RING_ENTRIES + RING_ENTRY_BYTES * (sent & (RING_MESSAGES - 1)))
    entry[0], entry[1], entry[2] = a.begin, a.n_bytes, a.asked
    store_int32(a.sent, sent + 1)
    system_call(a.syscall, a.futex, a.sent, _FUTEX_WAKE, 1, 0)


def ring_publish(args: int) -> None:
    """See `arguments.RingPublish`."""
    _say(_publish(args))


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


def ring_ask(args: int) -> None:
    """See `arguments.RingAsk`. Nothing else is in flight, so a request lies where messages begin."""
    a = _ask(args)
    step, first, first_row = as_int64(a.step), as_int64(a.first), as_int64(a.first_row)
    if step[_VOID] != 0:
        return
    n_asked = 0
    for w in range(a.n_workers):
        n_asked += first[w + 1] > first[w]
    for w in range(a.n_workers):
        n_pairs, n_rows = first[w + 1] - first[w], first_row[w + 1] - first_row[w]
        if n_pairs == 0:
            continue
        pair = as_int64(a.pairs + _PAIR_BYTES * w)
        page, message = pair[_REQUESTS], pair[_REQUESTS] + RING_DATA
        words, halves, n_bytes = as_int64(message), as_int32(message), 4 * n_rows * a.d + 8 * n_pairs
        words[0], words[_AT_PAYLOAD], words[_AT_COMPUTE_NS] = _REQUEST_WORD, n_bytes, 0
        words[_AT_ROUTER], words[_AT_EPOCH], words[_AT_STEP] = step[_ROUTER], step[_EPOCH], step[_STEP]
        halves[_AT_LAYER], halves[_AT_PART], halves[_AT_ATTEMPT] = a.layer, a.layer, 0
        halves[_AT_TOKENS], halves[_AT_PAIRS], halves[_AT_WIDTH] = n_rows, n_pairs, a.d
        row, token, expert = a.row + 8 * first_row[w], a.token + 4 * first[w], a.expert + 4 * first[w]
        pack(PackRequest(a.x, a.x_stride, a.d, row, n_rows, token, expert, n_pairs, message + HEADER_BYTES))
        pair[_ASKED], pair[_REQUEST_BYTES] = 1, pair[_REQUEST_BYTES] + n_bytes
        n_bytes += HEADER_BYTES
        _say(RingPublish(page, page + RING_SENT, RING_DATA, n_bytes, n_asked, a.syscall, a.futex))


@numba.njit
def _now_ns(a):  # type: ignore[no-untyped-def]
    system_call(a.syscall, a.clock_gettime, _CLOCK_MONOTONIC, a.clock, 0, 0)
    clock = as_int64(a.clock)
    return 1_000_000_000 * clock[0] + clock[1]


@numba.njit
def _has_reply(a, pair, limit_ns):  # type: ignore[no-untyped-def]
    """Wait for the next reply of a worker; false: there will be none, or not in time."""
    sent, known, began = pair[_REPLIES] + RING_SENT, pair[_RECEIVED], _now_ns(a)
    while load_int32(sent) == known:
        if pair[_LOST] != 0 or _now_ns(a) - began > limit_ns:
            return False
        system_call(a.syscall, a.futex, sent, _FUTEX_WAIT, known, a.nap)
    pair[_WAITED_NS] += _now_ns(a) - began
    return True


@numba.njit
def _reply_rows(a, pair, n_pairs):  # type: ignore[no-untyped-def]
    """Where the rows of the reply that has come begin; 0: it is not the one awaited. What the worker can change at any
    time is read once."""
    entry = pair[_REPLIES] + RING_ENTRIES + RING_ENTRY_BYTES * (pair[_RECEIVED] & (RING_MESSAGES - 1))
    begin, n_bytes, payload = load_int32(entry), load_int32(entry + 8), 4 * n_pairs * a.d
    if load_int32(entry + 4) != 0 or load_int32(entry + 12) != 0 or n_bytes != HEADER_BYTES + payload:
        return 0
    if begin < RING_DATA or begin % RING_ALIGN != 0 or begin > a.ring_bytes - n_bytes:
        return 0
    reply, asked = as_int64(pair[_REPLIES] + begin), as_int64(pair[_REQUESTS] + RING_DATA)
    if reply[0] != _REPLY_WORD or reply[_AT_PAYLOAD] != payload:
        return 0
    for word in range(1, _AT_PAYLOAD):
        if reply[word] != asked[word]:
            return 0
    pair[_COMPUTE_NS] += reply[_AT_COMPUTE_NS]
    pair[_REPLY_BYTES] += payload
    return pair[_REPLIES] + begin + HEADER_BYTES


def ring_collect(args: int) -> None:
    """See `arguments.RingCollect`."""
    a = _collect(args)
    step, first, parts = as_int64(a.step), as_int64(a.first), as_int64(a.parts)
    for w in range(a.n_workers):
        n_pairs, pair = first[w + 1] - first[w], as_int64(a.pairs + _PAIR_BYTES * w)
        parts[2 * w], parts[2 * w + 1] = first[w], a.spare
        if n_pairs == 0 or step[_VOID] != 0:
            continue
        if not _has_reply(a, pair, step[_LIMIT_NS]):
            step[_VOID] = 1
            continue
        store_int32(pair[_REQUESTS] + RING_DONE, pair[_RECEIVED])  # nobody reads the rows of the reply before any more
        rows = _reply_rows(a, pair, n_pairs)
        if rows == 0:
            step[_VOID] = 1
            continue
        parts[2 * w + 1] = rows
        pair[_ASKED] = 0
        pair[_RECEIVED] = ((pair[_RECEIVED] + 1 + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
    if step[_VOID] != 0:
        for w in range(a.n_workers):
            parts[2 * w + 1] = a.spare


KERNELS = (ring_publish, ring_sleep, ring_rouse, ring_ask, ring_collect)
