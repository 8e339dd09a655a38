"""The CPU kernel that answers a request of few rows from its first byte to the last of its reply.

Imported only to build it (see `native`): numba is here.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu import down_phase, hidden_phase
from workers.kernels.jit import as_int32, as_int64, take, wait_for_team
from workers.kernels.native import FEW_ROWS, HEADER_BYTES


@numba.njit(inline="never")
def _read(args):  # type: ignore[no-untyped-def]
    """Check the request, sort out its pairs and begin the reply. False: this kernel cannot answer it."""
    a = as_int64(args)
    d, f, n_experts, n_layers = a[4], a[5], a[6], a[18]
    message, n_bytes, begin, reply = a[16], a[17], a[20], a[21]
    words, halves = as_int64(message), as_int32(message)
    layer, n_tokens, n_pairs, width, payload = halves[8], halves[11], halves[12], halves[13], words[7]
    if words[0] != begin or width != d or not (0 <= layer < n_layers and 0 < n_tokens <= FEW_ROWS and n_pairs > 0):
        return False
    if payload != 4 * n_tokens * d + 8 * n_pairs or n_bytes != HEADER_BYTES + payload or n_pairs > a[24]:
        return False

    layers = as_int64(a[19])
    table, counters, rows = as_int64(layers[2 * layer]), as_int64(layers[2 * layer + 1]), message + HEADER_BYTES
    token = as_int32(rows + 4 * n_tokens * d)
    expert = as_int32(rows + 4 * n_tokens * d + 4 * n_pairs)
    starts, token_rows, hidden_rows = as_int64(a[9]), as_int64(a[10]), as_int64(a[11])
    before, first = -1, 0
    for p in range(n_pairs):
        e = expert[p]
        if not (max(before, 0) <= e < n_experts and 0 <= token[p] < n_tokens):
            return False
        if e != before:
            if table[2 * e] == 0:
                return False
            for between in range(before + 1, e + 1):
                starts[between] = p
            before, first = e, p
        elif p - first >= FEW_ROWS:
            return False
        token_rows[p] = rows + 4 * d * token[p]
        hidden_rows[p] = a[12] + 4 * f * p
    for after in range(before + 1, n_experts + 1):
        starts[after] = n_pairs
    for e in range(n_experts):
        counters[e] += starts[e + 1] - starts[e]

    a[8] = layers[2 * layer]
    answer = as_int64(reply)
    for word in range(7):
        answer[word] = words[word]
    answer[0] = a[22]
    answer[7], answer[8] = 4 * n_pairs * d, 0
    return True


def answer(args: int) -> None:
    """A REQUEST of `wire` to a REPLY, unweighted rows of all its pairs; a[23] becomes 1, or stays 0: nothing was done.

    It is answered if it is whole and right, of few float32 rows, and all its experts are held. a[4:16] are as in
    `experts_pairs`, but for the table, which is that of the layer asked; a[16] the request, a[17] its bytes; a[18]
    layers, a[19] the addresses of each one's table and counters; a[20] the first word of such a request; a[21] the
    reply, a[22] its first word; a[24] pairs that there is room for.
    """
    a = as_int64(args)
    if take(args + 16) == 0:
        a[23] = 1 if _read(args) else 0
    wait_for_team(a[3])
    if a[23] == 1:
        hidden_phase(args, 0)
        wait_for_team(a[3])
        down_phase(args, 0)


KERNELS = (answer,)
