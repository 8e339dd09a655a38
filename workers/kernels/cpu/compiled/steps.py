"""The CPU kernels of a captured step's exchange: requests into the rings of all workers, replies out of theirs.

Imported only to build them (see `library`): numba is here.
"""

from __future__ import annotations

import numba
import torch

from workers.kernels.cpu import arguments
from workers.kernels.cpu.arguments import PackRequest, RingPair, RingStep
from workers.kernels.cpu.compiled.dispatch import pack
from workers.kernels.cpu.compiled.jit import as_int32, as_int64, reader, store_int32
from workers.kernels.cpu.compiled.ring import await_message, find, following, mean, say
from workers.kernels.message import HEADER_BYTES, RING_DATA, RING_DONE
from workers.wire import REPLY, REQUEST, first_word, place

_ask, _collect = reader(arguments.RingAsk), reader(arguments.RingCollect)
_ROUTER, _EPOCH, _STEP, _LIMIT_NS, _VOID = range(len(RingStep._fields))
_REQUESTS, _REPLIES, _RECEIVED, _ASKED, _LOST, _REQUEST_BYTES, _REPLY_BYTES, _WAITED_NS, _COMPUTE_NS, _MEAN_NS = range(
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
        say(page, RING_DATA, n_bytes, n_asked, a.system)


@numba.njit
def _has_reply(a, w, pair, limit_ns):  # type: ignore[no-untyped-def]
    """Wait for the next reply of a worker; false: there will be none, or not in time."""
    stop = a.pairs + _PAIR_BYTES * w + 8 * _LOST
    came, waited_ns = await_message(pair[_REPLIES], pair[_RECEIVED], pair[_MEAN_NS], limit_ns, stop, a.system)
    pair[_WAITED_NS], pair[_MEAN_NS] = pair[_WAITED_NS] + waited_ns, mean(pair[_MEAN_NS], waited_ns)
    return came


@numba.njit
def _reply_rows(a, pair, n_pairs):  # type: ignore[no-untyped-def]
    """Where the rows of the reply that has come begin; 0: it is not the one awaited. What the worker can change at any
    time is read once."""
    at, n_bytes, _ = find(pair[_REPLIES], pair[_RECEIVED], a.ring_bytes)
    payload = 4 * n_pairs * a.d
    if at == 0 or n_bytes != HEADER_BYTES + payload:
        return 0
    reply, asked = as_int64(at), as_int64(pair[_REQUESTS] + RING_DATA)
    if reply[0] != _REPLY_WORD or reply[_AT_PAYLOAD] != payload:
        return 0
    for word in range(1, _AT_PAYLOAD):
        if reply[word] != asked[word]:
            return 0
    pair[_COMPUTE_NS] += reply[_AT_COMPUTE_NS]
    pair[_REPLY_BYTES] += payload
    return at + HEADER_BYTES


def ring_collect(args: int) -> None:
    """See `arguments.RingCollect`."""
    a = _collect(args)
    step, first, parts = as_int64(a.step), as_int64(a.first), as_int64(a.parts)
    for w in range(a.n_workers):
        n_pairs, pair = first[w + 1] - first[w], as_int64(a.pairs + _PAIR_BYTES * w)
        parts[2 * w], parts[2 * w + 1] = first[w], a.spare
        if n_pairs == 0 or step[_VOID] != 0:
            continue
        if not _has_reply(a, w, pair, step[_LIMIT_NS]):
            step[_VOID] = 1
            continue
        store_int32(pair[_REQUESTS] + RING_DONE, pair[_RECEIVED])  # nobody reads the rows of the reply before any more
        rows = _reply_rows(a, pair, n_pairs)
        if rows == 0:
            step[_VOID] = 1
            continue
        parts[2 * w + 1] = rows
        pair[_ASKED] = 0
        pair[_RECEIVED] = following(pair[_RECEIVED])
    if step[_VOID] != 0:
        for w in range(a.n_workers):
            parts[2 * w + 1] = a.spare


KERNELS = (ring_ask, ring_collect)
