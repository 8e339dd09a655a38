"""Norms of queries and keys, rotary embedding, and the write into the paged cache.

Legend: T token rows, H query heads, G key/value heads, d head size, R rotary size, C cache blocks of Z rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotary_write_kernel(
    qkv_ptr,  # [T, (H + 2G) * d]
    q_ptr,  # out [T, H, d]
    k_cache_ptr,  # [C, Z, G, d]
    v_cache_ptr,
    slot_ptr,  # int64 [T]: block * Z + offset; -1: nowhere
    cos_ptr,  # float32 [T, R]; the second half repeats the first
    sin_ptr,
    q_norm_ptr,  # NORM 1: [d]; NORM 2: [H * d]
    k_norm_ptr,  # NORM 1: [d]; NORM 2: [G * d]
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    R: tl.constexpr,
    D2: tl.constexpr,
    HEADS2: tl.constexpr,
    NORM: tl.constexpr,  # 0: none, 1: of each head, 2: of all query heads, and of all key heads, together
    PDL: tl.constexpr,
):
    """One row. Halves convention: i goes with i + R / 2; what is beyond R passes as it is."""
    t = tl.program_id(0).to(tl.int64)
    head, c = tl.arange(0, HEADS2)[:, None], tl.arange(0, D2)[None, :]
    half: tl.constexpr = R // 2
    other = tl.where(c < half, c + half, c - half)
    turns = c < R
    inside = (head < H + 2 * G) & (c < d)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = qkv_ptr + t * ((H + 2 * G) * d) + head * d
    v = tl.load(at + c, mask=inside, other=0.0)
    a = v.to(tl.float32)
    b = tl.load(at + other, mask=inside & turns, other=0.0).to(tl.float32)
    if NORM > 0:
        is_q, is_k = head < H, (head >= H) & (head < H + G)
        squares = tl.where(inside, a * a, 0.0)
        if NORM == 1:
            mean = tl.sum(squares, 1)[:, None] / d
            q_head, k_head = head * 0, head * 0
        else:
            q_mean = tl.sum(tl.sum(tl.where(is_q, squares, 0.0), 1), 0) / (H * d)
            k_mean = tl.sum(tl.sum(tl.where(is_k, squares, 0.0), 1), 0) / (G * d)
            mean = tl.where(is_q, q_mean, k_mean)
            q_head, k_head = head, head - H
        factor = tl.rsqrt(mean + eps)
        here, there = inside & (head < H + G), inside & turns & (head < H + G)
        weight = tl.load(q_norm_ptr + q_head * d + c, mask=here & is_q, other=0.0).to(tl.float32)
        weight += tl.load(k_norm_ptr + k_head * d + c, mask=here & is_k, other=0.0).to(tl.float32)
        its = tl.load(q_norm_ptr + q_head * d + other, mask=there & is_q, other=0.0).to(tl.float32)
        its += tl.load(k_norm_ptr + k_head * d + other, mask=there & is_k, other=0.0).to(tl.float32)
        a = ((a * factor).to(v.dtype).to(tl.float32) * weight).to(v.dtype).to(tl.float32)
        b = ((b * factor).to(v.dtype).to(tl.float32) * its).to(v.dtype).to(tl.float32)
    cos = tl.load(cos_ptr + t * R + c, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + t * R + c, mask=turns, other=0.0)
    slot = tl.load(slot_ptr + t)
    turned = tl.where(turns, tl.fma(tl.where(c < half, -b, b), sin, a * cos), a).to(v.dtype)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(q_ptr + t * (H * d) + head * d + c, turned, mask=inside & (head < H))
    k_at = k_cache_ptr + slot * (G * d) + (head - H) * d + c
    tl.store(k_at, turned.to(k_cache_ptr.dtype.element_ty), mask=inside & (head >= H) & (head < H + G) & (slot >= 0))
    v_at = v_cache_ptr + slot * (G * d) + (head - H - G) * d + c
    tl.store(v_at, v.to(v_cache_ptr.dtype.element_ty), mask=inside & (head >= H + G) & (slot >= 0))
