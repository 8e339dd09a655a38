"""One micro-batch on its way through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.kernels.ops import AttentionMetadata


@dataclass(slots=True)
class MicroBatch:
    """Shape legend: T rows, D hidden size, r rotated part of a head, R rows whose logits are wanted."""

    x_TD: Tensor  # the residual stream
    metadata: AttentionMetadata
    cos_Tr: Tensor
    sin_Tr: Tensor
    logit_rows_R: Tensor | None  # None: all rows
    handle: Any = None  # of the exchange in flight
