"""A captured dispatch over rings in shared memory: asked and collected by kernels, so that a step is one call.

Legend: T token rows, D hidden size, P (token, expert) pairs, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.cpu import arguments, kernel
from workers.kernels.cpu.ops import CpuOps
from workers.kernels.cpu.system import system
from workers.kernels.dispatch import Ints, Plan, address


@dataclass(frozen=True)
class StepRings:
    """What the kernels of a captured step share with the process that replays it. Legend: L layers, E experts."""

    pairs: NDArray[np.int64]  # `arguments.RingPair` [W]
    step: NDArray[np.int64]  # `arguments.RingStep`
    owner_LE: Ints  # which of the workers computes each expert
    count_LE: Ints  # the pairs of each expert are added to it
    ring_bytes: int

    def ask(self, ops: CpuOps, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Plan:
        """Send the rows to the workers of their experts; the plan of what comes back."""
        plan = ops.dispatch_plan(ids_TK, weights_TK, self.owner_LE[layer], len(self.pairs), self.count_LE[layer])
        (first, first_row), (token, expert) = plan.cuts_address, plan.pairs_address
        values = arguments.RingAsk(
            pairs=address(self.pairs), step=address(self.step), n_workers=len(self.pairs), layer=layer,
            x=x_TD.data_ptr(), x_stride=4 * x_TD.stride(0), d=x_TD.shape[1], first=first, first_row=first_row,
            row=plan.row_address, token=token, expert=expert, system=system(),
        )  # fmt: skip
        ops.run(kernel.ring_ask, 1, values)
        return plan

    def collect(self, ops: CpuOps, plan: Plan, d: int) -> Tensor:
        """y_TD: the weighted sums of what the workers answer; zeros in a void step."""
        parts = ops.empty(2 * len(self.pairs), dtype=torch.int64)
        spare_PD = ops.empty(plan.n_pairs, d).zero_()
        values = arguments.RingCollect(
            pairs=address(self.pairs), step=address(self.step), n_workers=len(self.pairs), d=d,
            first=plan.cuts_address[0], parts=parts.data_ptr(), spare=spare_PD.data_ptr(), ring_bytes=self.ring_bytes,
            system=system(),
        )  # fmt: skip
        ops.run(kernel.ring_collect, 1, values)
        return ops.sum_parts(parts.data_ptr(), len(self.pairs), plan, d)
