"""RMSNorm of a row, with what comes right before it (a residual addition, the weighted sum of the experts' rows) and
right after it (the gate's choice), so that the row is read once.

Legend: T token rows, K choices a token, E experts, D hidden, P pairs in expert order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.cuda.compiled.gate import choose


@triton.jit
def weighted_row(rows_ptr, place_ptr, weight_ptr, d, D: tl.constexpr, K: tl.constexpr, K2: tl.constexpr):
    """The weighted sum of one token's rows in expert order, in float32: rows lie in that order, so places ascend by
    expert; -1: the expert is not here."""
    choice = tl.arange(0, K2)
    place = tl.load(place_ptr + choice, mask=choice < K, other=-1)
    weight = tl.load(weight_ptr + choice, mask=(choice < K) & (place >= 0), other=0.0)
    far: tl.constexpr = 2147483647
    left = tl.where(place >= 0, place, far)
    total = tl.zeros_like(d).to(tl.float32)
    for _ in tl.static_range(K):
        at = tl.min(left, 0)
        w = tl.sum(tl.where(left == at, weight, 0.0), 0)
        row = tl.load(rows_ptr + at.to(tl.int64) * D + d, mask=(d < D) & (at < far), other=0.0)
        total = tl.fma(row.to(tl.float32), w, total)
        left = tl.where(left == at, far, left)
    return total


@triton.jit
def add_norm_kernel(
    residual_ptr,  # [T, D], written to where there is something to add
    delta_ptr,  # DELTA 1: [T, D]; DELTA 2: the experts' rows [P, D], unweighted
    place_ptr,  # int32 [T, K], DELTA 2: the row of each choice; -1: none
    weight_TK_ptr,  # float32 [T, K], DELTA 2
    norm_ptr,  # [D]
    x_ptr,  # out [T, D]: the norm of the residual
    gate_ptr,  # [E, D], with GATE
    bias_ptr,  # float32 [E], with BIAS
    live_ptr,  # int32 [1], with LIVE
    ids_ptr,  # out [T, C], with GATE
    weights_ptr,  # out float32 [T, C], with GATE
    eps,
    scale,  # of delta
    gate_scale,
    D: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    DELTA: tl.constexpr,
    GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: residual += scale * delta, RMSNorm, and what is asked for beyond that."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D2)
    inside = d < D
    norm = tl.load(norm_ptr + d, mask=inside, other=0.0)  # weights: nothing that is waited for writes them
    if GATE:
        e = tl.arange(0, E2)
        gate = tl.load(gate_ptr + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    r = tl.load(residual_ptr + t * D + d, mask=inside, other=0.0)
    if DELTA == 1:
        delta = tl.load(delta_ptr + t * D + d, mask=inside, other=0.0).to(tl.float32)
        r = tl.fma(delta, scale, r.to(tl.float32)).to(r.dtype)
        tl.debug_barrier()  # threads may hold the same entries: all have read before one writes
        tl.store(residual_ptr + t * D + d, r, mask=inside)
    if DELTA == 2:
        delta = weighted_row(delta_ptr, place_ptr + t * K, weight_TK_ptr + t * K, d, D, K, K2)
        r = tl.fma(delta.to(r.dtype).to(tl.float32), scale, r.to(tl.float32)).to(r.dtype)
        tl.debug_barrier()
        tl.store(residual_ptr + t * D + d, r, mask=inside)
    f = r.to(tl.float32)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    x = (f.to(r.dtype).to(tl.float32) * norm.to(tl.float32)).to(r.dtype)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(x_ptr + t * D + d, x, mask=inside)
    x = x.to(tl.float32)
    if GATE:
        logits = tl.sum(gate.to(tl.float32) * x[None, :], 1)
        is_row = True
        if LIVE:
            is_row = t < tl.load(live_ptr)
        choose(
            logits, bias_ptr, is_row, ids_ptr + t * C, weights_ptr + t * C, E, E2, C, C2, SIGMOID, NORMALIZE, BIAS,
            gate_scale,
        )  # fmt: skip


@triton.jit
def weighted_sum_kernel(
    rows_ptr, place_ptr, weight_ptr, y_ptr, D: tl.constexpr, D2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr
):
    """y [T, D]: the weighted sum of a token's rows in expert order, by itself."""
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, D2)
    total = weighted_row(rows_ptr, place_ptr + t * K, weight_ptr + t * K, d, D, K, K2)
    tl.store(y_ptr + t * D + d, total.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def quantize_kernel(
    x_ptr,  # [T, D]
    x8_ptr,  # out e4m3 [T, D]
    scale_ptr,  # out float32 [T]
    D: tl.constexpr,
    D2: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row in 8 bits, its largest value the largest there is."""
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, D2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(scale_ptr + t, scale)
    tl.store(x8_ptr + t * D + d, (x / scale).to(x8_ptr.dtype.element_ty), mask=d < D)
