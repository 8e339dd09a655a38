"""The draw of the next tokens on the device.

Legend: R rows to draw from, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.cuda.compiled.sampling import draw_kernel
from workers.kernels.cuda.launch import power


@dataclass(frozen=True, slots=True)
class Draws:
    """Who draws, and how; everything on the device."""

    row_R: Tensor  # int64: the row of the logits
    slot_R: Tensor  # int64: where the token is kept for the next step
    temperature_R: Tensor  # float64; below 1e-5: the likeliest token
    top_k_R: Tensor  # int64; 0: off
    top_p_R: Tensor  # float64
    min_p_R: Tensor  # float64
    seed_R: Tensor  # int64, the bits of an unsigned
    position_R: Tensor  # int64


def draw(logits_TV: Tensor, draws: Draws, last: Tensor) -> Tensor:
    """One token a row, int32 [R], -1 where the logits are not finite; also written to `last` (int32) at its slot.

    logits: float32, contiguous.
    """
    n_rows, vocab = len(draws.row_R), logits_TV.shape[1]
    token_R = torch.empty(n_rows, dtype=torch.int32, device=logits_TV.device)
    work_RV = torch.empty(n_rows, vocab, dtype=torch.float32, device=logits_TV.device)
    if n_rows:
        draw_kernel[(n_rows,)](
            logits_TV, draws.row_R, work_RV, draws.temperature_R, draws.top_k_R, draws.top_p_R, draws.min_p_R,
            draws.seed_R, draws.position_R, token_R, draws.slot_R, last, vocab,
            BLOCK=min(8192, power(vocab)), num_warps=16,
        )  # fmt: skip
    return token_R
