"""The gate's choice: top-k experts and their weights.

Legend: T token rows, E experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels import native, reference
from workers.kernels.linear import is_fast, with_unit_stride


def gate_top_k(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, best first, and the softmax over their logits.

    Of equal logits the lower expert comes first. Returns ids int64 [T, k] and weights float32 [T, k].
    """
    if not is_fast(logits_TE):
        return reference.gate_top_k(logits_TE, k)
    logits_TE = with_unit_stride(logits_TE)
    n_rows, n_experts = logits_TE.shape
    ids_TK, weights_TK = native.empty(n_rows, k, dtype=torch.int64), native.empty(n_rows, k)
    native.gate_top_k(
        1,
        *(logits_TE.data_ptr(), 4 * logits_TE.stride(0), ids_TK.data_ptr(), weights_TK.data_ptr()),
        *(n_rows, n_experts, k),
    )
    return ids_TK, weights_TK
