"""The CPU kernel that reads a request of few rows, so that `experts_pairs` can write its reply at once.

Imported only to build it (see `native`): numba is here.
"""

from __future__ import annotations

from workers.kernels.jit import as_int32, as_int64
from workers.kernels.native import FEW_ROWS, HEADER_BYTES


def read_request(args: int) -> None:
    """Check a REQUEST of `wire`, sort out its pairs and begin its REPLY; then args[0] becomes 1.

    It stays 0, and nothing is done, unless the request is whole and right, of few float32 rows, and all its experts
    are held. a[4:16] are as in `experts_pairs`, for which the table of the layer asked is filled in; a[18] the request,
    a[19] its bytes; a[20] layers, a[21] the addresses of each one's table and counters; a[22] the first word of such a
    request; a[23] the reply, a[24] its first word; a[25] pairs that there is room for.
    """
    a = as_int64(args)
    d, f, n_experts, n_layers = a[4], a[5], a[6], a[20]
    message, n_bytes, begin, reply = a[18], a[19], a[22], a[23]
    words, halves = as_int64(message), as_int32(message)
    layer, n_tokens, n_pairs, width, payload = halves[8], halves[11], halves[12], halves[13], words[7]
    if words[0] != begin or width != d or not (0 <= layer < n_layers and 0 < n_tokens <= FEW_ROWS and n_pairs > 0):
        return
    if payload != 4 * n_tokens * d + 8 * n_pairs or n_bytes != HEADER_BYTES + payload or n_pairs > a[25]:
        return

    layers = as_int64(a[21])
    table, counters, rows = as_int64(layers[2 * layer]), as_int64(layers[2 * layer + 1]), message + HEADER_BYTES
    token = as_int32(rows + 4 * n_tokens * d)
    expert = as_int32(rows + 4 * n_tokens * d + 4 * n_pairs)
    starts, token_rows, hidden_rows = as_int64(a[9]), as_int64(a[10]), as_int64(a[11])
    before, first = -1, 0
    for p in range(n_pairs):
        e = expert[p]
        if not (max(before, 0) <= e < n_experts and 0 <= token[p] < n_tokens):
            return
        if e != before:
            if table[2 * e] == 0:
                return
            for between in range(before + 1, e + 1):
                starts[between] = p
            before, first = e, p
        elif p - first >= FEW_ROWS:
            return
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
    answer[0] = a[24]
    answer[7], answer[8] = 4 * n_pairs * d, 0
    a[0] = 1


KERNELS = (read_request,)
