"""`y = x @ w.T + bias` by our own kernel at every number of rows: a library chooses another sum for another batch."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cuda.compiled.linear import linear_kernel
from workers.kernels.cuda.launch import bulk_copies, descriptor, options
from workers.kernels.cuda.tiles import LinearPlan, card, linear_plan


def linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    plan: LinearPlan | None = None,
) -> Tensor:
    """x and weight contiguous, of one dtype of 16 bits; the result in `dtype`, None: theirs. Returns a new [T, N]."""
    (t, k), n = x_TK.shape, len(weight_NK)
    y_TN = torch.empty(t, n, dtype=dtype or x_TK.dtype, device=x_TK.device)
    if t == 0:
        return y_TN
    bm, tile = plan or linear_plan(card(x_TK.device), n, k, t)
    tma = tile.tma and bulk_copies(weight_NK)
    x_tma = tma and bm >= 128 and bulk_copies(x_TK)
    linear_kernel[(-(-t // bm) * -(-n // tile.bn),)](
        descriptor(x_TK, bm, tile.bk) if x_tma else x_TK,
        descriptor(weight_NK, tile.bn, tile.bk) if tma else weight_NK,
        bias_N, y_TN, t, N=n, K=k, BM=bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group, SWAP=tile.swap, TMA=tma,
        X_TMA=x_tma, BIAS=bias_N is not None, num_warps=tile.warps, num_stages=tile.stages, **options(x_TK.device),
    )  # fmt: skip
    return y_TN
