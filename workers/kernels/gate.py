"""The gate's choice: top-k experts and their weights."""

from __future__ import annotations

from torch import Tensor

from workers.kernels import reference


def gate_top_k(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, best first, and the softmax over their logits.

    Of equal logits the lower expert comes first. Returns ids int64 [T, k] and weights float32 [T, k].
    """
    return reference.gate_top_k(logits_TE, k)
