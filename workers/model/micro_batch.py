"""One micro-batch on its way through the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    #: By layer, the experts of the rows that give logits, [R, K]: of captured steps, and where they will be asked for.
    expert_ids: dict[int, Tensor] = field(default_factory=dict)
