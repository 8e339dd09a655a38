"""The CPU kernel that reads a request of few rows, so that `experts` can write its reply at once.

Imported only to build it (see `library`): numba is here.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu import arguments
from workers.kernels.cpu.arguments import Experts, Pairs
from workers.kernels.cpu.compiled.jit import as_int32, as_int64, load_int32, reader
from workers.kernels.cpu.compiled.products import place_pairs
from workers.kernels.cpu.kernel import HEAD
from workers.kernels.message import (
    COMPUTE_NS,
    FEW_ROWS,
    HEADER_BYTES,
    LAYER,
    N_PAIRS,
    N_TOKENS,
    PAYLOAD_BYTES,
    WIDTH,
)

_read_request = reader(arguments.ReadRequest)
_TOKEN, _EXPERT, _N_PAIRS = (HEAD + Pairs._fields.index(name) for name in ("token", "expert", "n_pairs"))
_X, _TABLE, _COUNTERS = (HEAD + Pairs._fields.index(name) for name in ("x", "table", "counters"))
_N_EXPERTS = HEAD + Pairs._fields.index("n_experts")
_TABLE_OF_EXPERTS = HEAD + Experts._fields.index("table")


@numba.njit(inline="never")
def read(args):  # type: ignore[no-untyped-def]
    """Check a REQUEST of `wire`, sort out its pairs and begin its REPLY; then the first counter becomes 1.

    It stays 0, and nothing is done, unless the request is whole and right, of few float32 rows, and all its experts
    are held. The sender may change the request at any time, so what is checked is read once.
    """
    a = _read_request(args)
    words, at = as_int64(a.message), a.message
    layer, n_tokens = load_int32(at + LAYER), load_int32(at + N_TOKENS)
    n_pairs, width = load_int32(at + N_PAIRS), load_int32(at + WIDTH)
    payload, payload_high = load_int32(at + PAYLOAD_BYTES), load_int32(at + PAYLOAD_BYTES + 4)
    if words[0] != a.request_word or width != a.d or not 0 <= layer < a.n_layers:
        return
    if not (0 < n_tokens <= FEW_ROWS and n_pairs == a.n_pairs):
        return
    if payload != 4 * n_tokens * a.d + 8 * n_pairs or payload_high != 0 or a.n_bytes != HEADER_BYTES + payload:
        return

    table, rows = as_int64(as_int64(a.tables)[2 * layer]), a.message + HEADER_BYTES
    token_at = rows + 4 * n_tokens * a.d
    tokens, experts, pairs = as_int32(a.copies), as_int32(a.copies + 4 * n_pairs), as_int64(a.pairs)
    before, token_before, n_experts = 0, -1, pairs[_N_EXPERTS]
    for p in range(n_pairs):
        token, e = load_int32(token_at + 4 * p), load_int32(token_at + 4 * (n_pairs + p))
        if not (before <= e < n_experts and 0 <= token < n_tokens) or table[2 * e] == 0:
            return
        if e == before and token <= token_before:
            return
        tokens[p], experts[p], before, token_before = token, e, e, token

    pairs[_TOKEN], pairs[_EXPERT], pairs[_N_PAIRS], pairs[_X] = a.copies, a.copies + 4 * n_pairs, n_pairs, rows
    pairs[_TABLE], pairs[_COUNTERS] = as_int64(a.tables)[2 * layer], as_int64(a.tables)[2 * layer + 1]
    place_pairs(a.pairs)
    as_int64(a.experts)[_TABLE_OF_EXPERTS] = pairs[_TABLE]
    reply = as_int64(a.reply)
    for word in range(HEADER_BYTES // 8):
        reply[word] = words[word]
    reply[0] = a.reply_word
    reply[PAYLOAD_BYTES // 8], reply[COMPUTE_NS // 8] = 4 * n_pairs * a.d, 0
    as_int64(args)[0] = 1


def read_request(args: int) -> None:
    """See `read`."""
    read(args)


KERNELS = (read_request,)
