"""A parity probe: what an expert makes of a few fixed rows, so that two replicas can be compared without their weights.

Legend: T rows, D hidden.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the controller compares probes and needs no torch
    from workers.shard import ExpertShard

_ROWS = 4
_CLOSE = 2e-2  # relative: kernels of different machines add up in another order, also in bfloat16


@dataclass(frozen=True, slots=True)
class Probe:
    """The fingerprint of one replica's answer."""

    digest: str  # of the bits of the rows
    sums: tuple[float, ...]  # of each row, with alternating signs: comparable between unlike machines

    def agrees(self, other: Probe, *, same_machine: bool) -> bool:
        """Whether both are of the same expert: to the bit on one machine, else to rounding."""
        if self.digest == other.digest:
            return True
        if same_machine:
            return False
        scale = max(map(abs, (*self.sums, *other.sums)))
        pairs = zip(self.sums, other.sums, strict=True)
        return scale > 0 and all(math.isfinite(a) and abs(a - b) <= _CLOSE * scale for a, b in pairs)


def probe(shard: ExpertShard, layer: int, expert: int) -> Probe:
    """Ask the replica of `(layer, expert)` in `shard`. Raises ExpertNotHeld."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_ROWS, shard.hidden_size, generator=generator).to(shard.device, shard.dtype)
    token_T = torch.arange(_ROWS, dtype=torch.int32, device=shard.device)
    y_TD = shard.forward(layer, x_TD, token_T, torch.full_like(token_T, expert)).cpu().contiguous()
    sign_D = 1.0 - 2.0 * (torch.arange(shard.hidden_size) % 2)
    sums = (y_TD.double() * sign_D).sum(1).tolist()
    return Probe(hashlib.sha256(y_TD.view(torch.uint8).numpy().tobytes()).hexdigest(), tuple(sums))
