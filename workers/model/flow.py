"""One micro-batch on its way through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workers.model.attention import AttentionPlan

if TYPE_CHECKING:
    from workers.model.recorded import Recorded


@dataclass(slots=True)
class Flow:
    """Shape legend: T rows, D hidden size, d head size, R rows whose logits are wanted."""

    x_TD: Tensor  # the residual stream
    plan: AttentionPlan
    slots_T: Tensor
    rows_T: Tensor  # 0 ... T - 1: `cos` and `sin` are by row
    cos_Td: Tensor
    sin_Td: Tensor
    logit_rows_R: Tensor | None  # None: all rows
    handle: Any = None  # of the exchange in flight
    recorded: Recorded | None = None  # how to repeat what the layers do with it
