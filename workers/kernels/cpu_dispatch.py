"""The CPU kernels of a router's dispatch: rows sorted by worker and expert, and the weighted sum of what comes back.

Imported only to build them (see `native`): numba is here. Each runs on one thread.
"""

from __future__ import annotations

import numba

from workers.kernels.jit import as_float32, as_int32, as_int64
from workers.kernels.native import HEADER_BYTES


@numba.njit
def _pack(args, first, first_row, first_byte, row, token, expert):  # type: ignore[no-untyped-def]
    """Write each worker's request, but for its header: rows, token_P, expert_P."""
    a = as_int64(args)
    messages, x, x_stride, d = a[13], a[14], a[15], a[16]
    end = 0
    for w in range(a[11]):
        first_byte[w] = end
        n_rows, n_pairs = first_row[w + 1] - first_row[w], first[w + 1] - first[w]
        if n_pairs > 0:
            rows = messages + end + HEADER_BYTES
            for r in range(n_rows):
                source, target = as_float32(x + row[first_row[w] + r] * x_stride), as_float32(rows + 4 * d * r)
                for i in range(d):
                    target[i] = source[i]
            tokens, experts = as_int32(rows + 4 * d * n_rows), as_int32(rows + 4 * d * n_rows + 4 * n_pairs)
            for p in range(n_pairs):
                tokens[p] = token[first[w] + p]
                experts[p] = expert[first[w] + p]
            # The next one begins at a multiple of 8 bytes, as the fields of its header want to.
            end += (HEADER_BYTES + 4 * d * n_rows + 8 * n_pairs + 7) // 8 * 8
    first_byte[a[11]] = end


def dispatch_plan(args: int) -> None:
    """Sort the pairs by (worker, expert, token), and number the rows of each worker; see `dispatch.Plan`.

    a[13], where it is not 0, takes every worker's request; a[14] x, a[15] the bytes from one of its rows to the next,
    a[16] the length of a row.
    """
    a = as_int64(args)
    ids, weights, owner, counter = as_int64(a[4]), as_int32(a[5]), as_int64(a[6]), as_int64(a[7])
    n_tokens, k, n_experts, n_workers, first_at = a[8], a[9], a[10], a[11], a[12]
    n_pairs = n_tokens * k
    first_row_at = first_at + 8 * (n_workers + 1)
    first_byte_at = first_row_at + 8 * (n_workers + 1)
    place_at = first_byte_at + 8 * (n_workers + 1)
    row_at = place_at + 8 * n_pairs
    weights_at = row_at + 8 * n_pairs
    token_at = weights_at + 4 * n_pairs
    expert_at = token_at + 4 * n_pairs
    scratch = weights_at + 8 * ((3 * n_pairs + 1) // 2)
    first, first_row, place, row = as_int64(first_at), as_int64(first_row_at), as_int64(place_at), as_int64(row_at)
    sorted_weights, token, expert = as_int32(weights_at), as_int32(token_at), as_int32(expert_at)
    following, number = as_int64(scratch), as_int64(scratch + 8 * n_experts)

    for e in range(n_experts):
        following[e] = 0
    for p in range(n_pairs):
        following[ids[p]] += 1
    end = 0
    first[0] = 0
    for w in range(n_workers):
        for e in range(n_experts):
            if owner[e] == w:
                count = following[e]
                counter[e] += count
                following[e] = end
                end += count
        first[w + 1] = end

    for t in range(n_tokens):
        for i in range(t * k, t * k + k):
            e = ids[i]
            at = following[e]
            following[e] = at + 1
            token[at] = t
            expert[at] = e
            rank = t * k
            for other in range(t * k, t * k + k):
                if ids[other] < e:
                    rank += 1
            place[rank] = at
            sorted_weights[rank] = weights[i]

    rows = 0
    first_row[0] = 0
    for w in range(n_workers):
        for t in range(n_tokens):
            number[t] = -1
        for at in range(first[w], first[w + 1]):
            number[token[at]] = 0
        for t in range(n_tokens):
            if number[t] == 0:
                number[t] = rows - first_row[w]
                row[rows] = t
                rows += 1
        for at in range(first[w], first[w + 1]):
            token[at] = number[token[at]]
        first_row[w + 1] = rows
    if a[13] != 0:
        _pack(args, first, first_row, as_int64(first_byte_at), row, token, expert)


def weighted_sum(args: int) -> None:
    """out[t] = the sum over k of weights[t, k] * rows[place[t, k]], added in the order of k."""
    a = as_int64(args)
    rows, place, weights, out, n_tokens, k, d = a[4], as_int64(a[5]), as_float32(a[6]), a[7], a[8], a[9], a[10]
    for t in range(n_tokens):
        target, row, weight = as_float32(out + 4 * t * d), as_float32(rows + 4 * place[t * k] * d), weights[t * k]
        for i in range(d):
            target[i] = weight * row[i]
        for pair in range(t * k + 1, t * k + k):
            row, weight = as_float32(rows + 4 * place[pair] * d), weights[pair]
            for i in range(d):
                target[i] += weight * row[i]


def weigh_rows(args: int) -> None:
    """rows[t] *= weights[t] where row t is token t's, for all t; args[0] becomes 1. Otherwise nothing is done."""
    a = as_int64(args)
    rows, place, weights, n_tokens, d = a[4], as_int64(a[5]), as_float32(a[6]), a[7], a[8]
    for t in range(n_tokens):
        if place[t] != t:
            return
    a[0] = 1
    for t in range(n_tokens):
        weight = weights[t]
        if weight != 1:
            row = as_float32(rows + 4 * t * d)
            for i in range(d):
                row[i] *= weight


KERNELS = (dispatch_plan, weighted_sum, weigh_rows)
