"""The two products of a layer's experts: gate and up with SiLU, then down.

Legend: T token rows, K choices a token, P = T * K pairs in expert order, S slots (places of expert weights on this
device), D hidden, F ffn, M row blocks of at most BM pairs of one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.cuda.compiled.tile import product, tile_of


@triton.jit(do_not_specialize=["M"])
def gate_up_kernel(
    x_ptr,  # [T, D]; with X_TMA the descriptor of blocks [BM, BK] of the pairs' rows in order, [P, D]
    x_scale_ptr,  # float32 [T], with an x of 8 bits
    w_ptr,  # [S, 2F, D], or its descriptor [S * 2F, D] of blocks [BN, BK]
    w_scale_ptr,  # float32 [S, 2F], with weights of 8 bits
    h_ptr,  # out [P, F]: silu(gate) * up
    h_scale_ptr,  # out float32 [P, F / BN], with an h of 8 bits
    order_ptr,  # int32 [P]
    block_ptr,  # int32 [3, M]
    M,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    W8: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of BN columns of h for one row block."""
    tiles: tl.constexpr = (F + BN - 1) // BN
    block, n = tile_of(tl.program_id(0), M, tiles, GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(block_ptr + block)
    if slot < 0:
        return
    first_row = tl.load(block_ptr + M + block)
    row = first_row + tl.arange(0, BM)
    is_row = row < tl.load(block_ptr + 2 * M + block)
    token = tl.load(order_ptr + row, mask=is_row, other=0) // K
    k = tl.arange(0, BK)
    whole_k: tl.constexpr = D % BK == 0
    if not X_TMA:
        x_at = x_ptr + token[:, None] * D + k[None, :]
    column = n * BN + tl.arange(0, BN)
    first = slot * (2 * F) + n * BN
    if not TMA:
        gate_at = w_ptr + first.to(tl.int64) * D + tl.arange(0, BN)[:, None] * D + k[None, :]
        up_at = gate_at + F * D
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    gate, up = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)
    for start in range(0, D, BK):
        if X_TMA:  # rows of other blocks come along, and are not stored
            x = x_ptr.load([first_row, start])
        elif whole_k:
            x = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
        else:
            x = tl.load(x_at + start, mask=is_row[:, None] & (start + k < D)[None, :], other=0.0)
        if TMA:
            w1 = w_ptr.load([first, start])
            w3 = w_ptr.load([first + F, start])
        elif whole_k and F % BN == 0:
            w1 = tl.load(gate_at + start)
            w3 = tl.load(up_at + start)
        else:
            inside = (column < F)[:, None] & (start + k < D)[None, :]
            w1 = tl.load(gate_at + start, mask=inside, other=0.0)
            w3 = tl.load(up_at + start, mask=inside, other=0.0)
        if W8 and not A8:  # e4m3 is exact in float16, and one instruction makes two of them
            x, w1, w3 = x.to(tl.float16), w1.to(tl.float16), w3.to(tl.float16)
        gate = product(w1, x, gate, SWAP)
        up = product(w3, x, up, SWAP)
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if W8:
        scale_at = w_scale_ptr + slot * (2 * F) + column
        gate = gate * tl.load(scale_at, mask=column < F, other=0.0)[None, :]
        up = up * tl.load(scale_at + F, mask=column < F, other=0.0)[None, :]
    if A8:
        x_scale = tl.load(x_scale_ptr + token, mask=is_row, other=0.0)[:, None]
        gate, up = gate * x_scale, up * x_scale
    h = gate / (1.0 + tl.exp(-gate)) * up
    if A8:
        if F % BN != 0:
            h = tl.where((column < F)[None, :], h, 0.0)
        h_scale = tl.maximum(tl.max(tl.abs(h), 1), 1e-12) / 448.0
        tl.store(h_scale_ptr + row * tiles + n, h_scale, mask=is_row)
        h = h / h_scale[:, None]
    elif W8:
        h = tl.clamp(h, -65504.0, 65504.0)
    h_at = h_ptr + row[:, None].to(tl.int64) * F + column[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=is_row[:, None] & (column < F)[None, :])


@triton.jit(do_not_specialize=["M"])
def down_kernel(
    h_ptr,  # [P, F], or with X_TMA its descriptor of blocks [BM, BK]
    h_scale_ptr,  # float32 [P, F / HN], with an h of 8 bits
    w_ptr,  # [S, D, F], or its descriptor [S * D, F] of blocks [BN, BK]
    w_scale_ptr,  # float32 [S, D], with weights of 8 bits
    y_ptr,  # out [P, D]: unweighted rows
    block_ptr,
    M,
    D: tl.constexpr,
    F: tl.constexpr,
    HN: tl.constexpr,  # columns of h that share a scale; a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    W8: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of BN columns of y for one row block."""
    block, n = tile_of(tl.program_id(0), M, (D + BN - 1) // BN, GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(block_ptr + block)
    if slot < 0:
        return
    first_row = tl.load(block_ptr + M + block)
    row = first_row + tl.arange(0, BM)
    is_row = row < tl.load(block_ptr + 2 * M + block)
    k = tl.arange(0, BK)
    whole_k: tl.constexpr = F % BK == 0
    if not X_TMA:
        h_at = h_ptr + row[:, None].to(tl.int64) * F + k[None, :]
    column = n * BN + tl.arange(0, BN)
    first = slot * D + n * BN
    if not TMA:
        w_at = w_ptr + first.to(tl.int64) * F + tl.arange(0, BN)[:, None] * F + k[None, :]
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    acc = tl.zeros(shape, tl.float32)
    for start in range(0, F, BK):
        if X_TMA:
            h = h_ptr.load([first_row, start])
        elif whole_k:
            h = tl.load(h_at + start, mask=is_row[:, None], other=0.0)
        else:
            h = tl.load(h_at + start, mask=is_row[:, None] & (start + k < F)[None, :], other=0.0)
        if TMA:
            w = w_ptr.load([first, start])
        elif whole_k and D % BN == 0:
            w = tl.load(w_at + start)
        else:
            w = tl.load(w_at + start, mask=(column < D)[:, None] & (start + k < F)[None, :], other=0.0)
        if W8 and not A8:
            w = w.to(tl.float16)
        if A8:
            scale = tl.load(h_scale_ptr + row * ((F + HN - 1) // HN) + start // HN, mask=is_row, other=0.0)
            if SWAP:
                acc += tl.dot(w, tl.trans(h)) * scale[None, :]
            else:
                acc += tl.dot(h, tl.trans(w)) * scale[:, None]
        else:
            acc = product(w, h, acc, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if W8:
        acc = acc * tl.load(w_scale_ptr + slot * D + column, mask=column < D, other=0.0)[None, :]
    y_at = y_ptr + row[:, None].to(tl.int64) * D + column[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & (column < D)[None, :])
