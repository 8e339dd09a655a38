"""The ranks of a router's captured steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepGroup:
    """A router, rank 0, and all workers of a group in lockstep: each layer of each step, there and back.

    Messages have a fixed size, and all that a call does is launch, or over gloo wait: a step over NCCL can be captured.
    """

    def __init__(self, ranks: Any, rank: int, size: int, device: torch.device) -> None:
        """ranks: the process group. Exchanges one byte with everybody, so that all are connected."""
        self.ranks = ranks
        self.rank, self.n_workers, self.device = rank, size - 1, device
        byte = torch.zeros(size - 1 if rank == 0 else 1, dtype=torch.uint8, device=device)
        self.to_workers(byte[:1])
        self.to_router(byte)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def to_workers(self, block: Tensor) -> None:
        """The router's `block` to all of them, whose memory for it has the same shape."""
        self.ranks.broadcast(block, 0).wait()

    def to_router(self, rows: Tensor) -> None:
        """Of the router: rows [N * C, ...] come in, C from each worker. Of a worker: rows [C, ...] go out."""
        nothing, none = rows[:0], [0] * (1 + self.n_workers)
        if self.rank == 0:
            each = [0] + [len(rows) // self.n_workers] * self.n_workers
            self.ranks.alltoall_base(rows, nothing, each, none).wait()
        else:
            self.ranks.alltoall_base(nothing, rows, none, [len(rows), *none[1:]]).wait()
