"""`y = x @ w.T + bias` by one chain of products over K, whatever the tile: a row's bits do not depend on its batch."""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.cuda.compiled.tile import product, tile_of


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x_ptr,  # [T, K], or with X_TMA its descriptor of blocks [BM, BK]
    w_ptr,  # [N, K], or with TMA its descriptor of blocks [BN, BK]
    bias_ptr,  # [N], with BIAS
    y_ptr,  # out [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of BM rows by BN columns."""
    block, n = tile_of(tl.program_id(0), (T + BM - 1) // BM, (N + BN - 1) // BN, GROUP)
    row, column, k = block * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    whole_k: tl.constexpr = K % BK == 0
    if not X_TMA:
        x_at = x_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    if not TMA:
        w_at = w_ptr + column[:, None].to(tl.int64) * K + k[None, :]
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    acc = tl.zeros(shape, tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in range(0, K, BK):
        if X_TMA:
            x = x_ptr.load([block * BM, start])
        elif whole_k:
            x = tl.load(x_at + start, mask=(row < T)[:, None], other=0.0)
        else:
            x = tl.load(x_at + start, mask=(row < T)[:, None] & (start + k < K)[None, :], other=0.0)
        if TMA:
            w = w_ptr.load([n * BN, start])
        elif whole_k and N % BN == 0:
            w = tl.load(w_at + start)
        else:
            w = tl.load(w_at + start, mask=(column < N)[:, None] & (start + k < K)[None, :], other=0.0)
        acc = product(w, x, acc, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if BIAS:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(row < T)[:, None] & (column < N)[None, :])
