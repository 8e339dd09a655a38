"""From logits to tokens, one program a row: temperature, top-k, top-p, min-p, draw, by the rules of the host's sampler.

No sort: a threshold is found bit by bit, from how much of the row is above it. Weights and what is divided or compared
are float32, exact as on the host; sums of weights are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_key(x):
    """Bits of a float32 that is not negative: they ascend as it does."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def kth_distance(z_ptr, k, V, BLOCK: tl.constexpr):
    """The bits of the k-th smallest of -z [V], all of which are >= 0."""
    low, high = 0, 0x7F800000
    while low < high:
        middle = low + (high - low) // 2
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + v, mask=v < V, other=float("-inf"))
            count += ((as_key(0.0 - z) <= middle) & (v < V)).to(tl.int32)
        enough = tl.sum(count, 0) >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def sum_from(w_ptr, key, V, BLOCK: tl.constexpr):
    """The sum of the weights whose bits are at least `key`, float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + v, mask=v < V, other=0.0)
        total += tl.where(as_key(w) >= key, w, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def uniform(seed, position):
    """Philox 4x32-10 with the key `seed` and the counter `position`: 53 random bits as a float64 in [0, 1)."""
    zero = tl.zeros_like(position).to(tl.uint32)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def draw_kernel(
    logits_ptr,  # float32 [.., V]
    row_ptr,  # int64 [R]: the row of `logits` to look at
    work_ptr,  # float32 [R, V]: scratch
    temperature_ptr,  # float64 [R]; below 1e-5: the likeliest token
    top_k_ptr,  # int64 [R]; 0: off
    top_p_ptr,  # float64 [R]
    min_p_ptr,  # float64 [R]
    seed_ptr,  # int64 [R], its bits unsigned
    position_ptr,  # int64 [R]
    token_ptr,  # out int32 [R]; -1: the logits are not finite
    slot_ptr,  # int64 [R]: where the token is kept for the next step
    last_ptr,  # out int32 [slots]
    V,
    BLOCK: tl.constexpr,
):
    """The next token of a row."""
    r = tl.program_id(0)
    row_at = logits_ptr + tl.load(row_ptr + r).to(tl.int64) * V
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where, odd = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row_at + v, mask=v < V, other=float("-inf"))
        odd += (x != x).to(tl.int32)
        where = tl.where(x > best, v, where)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, where, V), 0)
    finite = (tl.sum(odd, 0) == 0) & (tl.abs(top) < float("inf"))
    temperature = tl.load(temperature_ptr + r).to(tl.float32)
    if finite & (temperature >= 1e-5):
        work_at = work_ptr + r.to(tl.int64) * V
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row_at + v, mask=v < V, other=0.0)
            tl.store(work_at + v, tl.div_rn(x - top, temperature), mask=v < V)
        tl.debug_barrier()
        top_k, least = tl.load(top_k_ptr + r), 0x7F800000
        if (top_k > 0) & (top_k < V):
            least = kth_distance(work_at, top_k, V, BLOCK)
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(work_at + v, mask=v < V, other=float("-inf"))
            w = tl.where(as_key(0.0 - z) <= least, tl.exp(z.to(tl.float64)).to(tl.float32), 0.0)
            total += w.to(tl.float64)
            tl.store(work_at + v, w, mask=v < V)
        tl.debug_barrier()
        top_p, least = tl.load(top_p_ptr + r), 0
        if top_p < 1.0:
            mass = top_p * tl.sum(total, 0)
            high = 0x3F800000  # the likeliest token weighs 1
            while least < high:
                middle = least + (high - least + 1) // 2
                enough = sum_from(work_at, middle, V, BLOCK) >= mass
                least = tl.where(enough, middle, least)
                high = tl.where(enough, high, middle - 1)
        least = tl.maximum(least, as_key(tl.load(min_p_ptr + r).to(tl.float32)))
        target = uniform(tl.load(seed_ptr + r), tl.load(position_ptr + r)) * sum_from(work_at, least, V, BLOCK)
        before, found, last = tl.sum(tl.zeros([BLOCK], tl.float64), 0), V, 0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            w = tl.load(work_at + v, mask=v < V, other=0.0)
            w = tl.where(as_key(w) >= least, w, 0.0).to(tl.float64)
            above = (before + tl.cumsum(w, 0) > target) & (w > 0)
            found = tl.minimum(found, tl.min(tl.where(above, v, V), 0))
            last = tl.maximum(last, tl.max(tl.where(w > 0, v, 0), 0))
            before += tl.sum(w, 0)
        token = tl.where(found < V, found, last)
    token = tl.where(finite, token, -1)
    tl.store(token_ptr + r, token)
    tl.store(last_ptr + tl.load(slot_ptr + r), tl.maximum(token, 0))
