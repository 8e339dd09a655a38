"""The CPU kernels of a dispatch: pairs sorted by worker and expert, and the weighted sum of the rows that come back.

Imported only to build them (see `library`): numba is here.
"""

from __future__ import annotations

import numba

from workers.kernels.cpu import arguments
from workers.kernels.cpu.compiled.jit import as_float32, as_int32, as_int64, reader, take

_plan, _weighted_sum = reader(arguments.Plan), reader(arguments.WeightedSum)
_pack_request = reader(arguments.PackRequest)
#: Columns of a sum that one thread takes at a time.
_UNIT = 512


@numba.njit(inline="never")
def pack(a):  # type: ignore[no-untyped-def]
    """See `arguments.PackRequest`."""
    row, token, expert = as_int64(a.row), as_int32(a.token), as_int32(a.expert)
    for r in range(a.n_rows):
        source, target = as_float32(a.x + row[r] * a.x_stride), as_float32(a.out + 4 * a.d * r)
        for i in range(a.d):
            target[i] = source[i]
    tokens, experts = as_int32(a.out + 4 * a.d * a.n_rows), as_int32(a.out + 4 * a.d * a.n_rows + 4 * a.n_pairs)
    for p in range(a.n_pairs):
        tokens[p] = token[p]
        experts[p] = expert[p]


def pack_request(args: int) -> None:
    """See `arguments.PackRequest`."""
    pack(_pack_request(args))


def plan(args: int) -> None:
    """Sort the pairs by (worker, expert, token), and number the rows of each worker; see `dispatch.Plan`."""
    a = _plan(args)
    ids, weights, owner, counter = as_int64(a.ids), as_int32(a.weights), as_int64(a.owner), as_int64(a.counter)
    n_tokens, k, n_experts, n_workers, first_at = a.n_tokens, a.k, a.n_experts, a.n_workers, a.memory
    n_pairs = n_tokens * k
    first_row_at = first_at + 8 * (n_workers + 1)
    place_at = first_row_at + 8 * (n_workers + 1)
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
            if a.owner == 0 or owner[e] == w:
                count = following[e]
                if a.counter != 0:
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


def weighted_sum(args: int) -> None:
    """out[t] = the sum over k of weights[t, k] * rows[place[t, k]], added in the order of k. The rows lie in parts."""
    a = _weighted_sum(args)
    place, weights, blocks = as_int64(a.place), as_float32(a.weights), (a.d + _UNIT - 1) // _UNIT
    parts = as_int64(a.parts)
    u = take(args)
    while u < a.n_tokens * blocks:
        t, first = u // blocks, _UNIT * (u % blocks)
        n, target = min(_UNIT, a.d - first), as_float32(a.out + 4 * (t * a.d + first))
        for pair in range(t * a.k, t * a.k + a.k):
            part = a.n_parts - 1
            while place[pair] < parts[2 * part]:
                part -= 1
            row = as_float32(parts[2 * part + 1] + 4 * ((place[pair] - parts[2 * part]) * a.d + first))
            weight = weights[pair]
            if pair == t * a.k:
                for i in range(n):
                    target[i] = weight * row[i]
            else:
                for i in range(n):
                    target[i] += weight * row[i]
        u = take(args)


KERNELS = (plan, pack_request, weighted_sum)
