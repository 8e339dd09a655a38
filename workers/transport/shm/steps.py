"""Decoding steps captured whole, their exchange over the rings of all workers included: one call computes a step.

Legend: T token rows, K experts a token, D hidden size, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.cpu.arguments import RingPair, RingStep
from workers.kernels.cpu.ops import CpuOps
from workers.kernels.cpu.rings import StepRings
from workers.kernels.dispatch import Plan
from workers.kernels.ops import Ops
from workers.transport.base import StepReport, StepTraffic, Tag
from workers.transport.shm.memory import NAME
from workers.transport.shm.ring import RING_BYTES
from workers.transport.shm.router import Pair, ShmWay

MAX_WORKERS = 16
_LIMIT_NS, _VOID = map(RingStep._fields.index, ("limit_ns", "void"))


class RingSteps:
    """The rings of a router as a way for whole steps. The step loop's alone.

    A step goes this way when nothing else is in flight. One that a worker does not answer in time, or answers with
    something else, is void: what it computed is worth nothing, and it is computed again layer by layer, where losses
    are repaired.
    """

    name = key = NAME

    def __init__(self, way: ShmWay, n_layers: int, n_experts: int) -> None:
        self._way = way
        self._pairs: tuple[Pair, ...] = ()
        self._rings = rings = StepRings(
            pairs=np.zeros((MAX_WORKERS, len(RingPair._fields)), np.int64),
            step=np.zeros(len(RingStep._fields), np.int64),
            owner_LE=np.zeros((n_layers, n_experts), np.int64),
            count_LE=np.zeros((n_layers, n_experts), np.int64),
            ring_bytes=RING_BYTES,
        )
        self.experts = StepExperts(rings, None)

    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool:
        """Whether a step can go this way now. owner_LE: which of `workers` computes each expert, by its place there."""
        pairs = [self._way.pairs.get(worker) for worker in workers]
        idle = tuple(pair for pair in pairs if pair is not None and pair.is_idle)
        if len(idle) != len(workers) or len(workers) > MAX_WORKERS:
            return False
        self._pairs = idle
        np.copyto(self._rings.owner_LE, owner_LE)
        return True

    def begin_step(self, n_rows: int, tag: Tag, limit_s: float) -> bool:
        """Number a step: true, workers need not be asked beforehand. limit_s: how long a reply may take."""
        rings = self._rings
        rings.count_LE.fill(0)
        rings.pairs.fill(0)
        rings.step[:3] = np.array((tag.router, tag.epoch, tag.step), np.uint64).view(np.int64)
        rings.step[_LIMIT_NS], rings.step[_VOID] = int(limit_s * 1e9), 0
        for pair, row in zip(self._pairs, rings.pairs, strict=False):
            pair.lend(row)
        return True

    def end_step(self) -> StepReport | None:
        """What the step did; None when it is void. Replies that are still to come are nobody's then."""
        rings, (pairs, self._pairs) = self._rings, (self._pairs, ())
        for pair in pairs:
            pair.take_back()
        if rings.step[_VOID]:
            return None
        sums = (RingPair(*row) for row in rings.pairs[: len(pairs)].tolist())
        return StepReport(
            rings.count_LE,
            tuple(
                StepTraffic(row.request_bytes, row.reply_bytes, row.waited_ns / 1e9, row.compute_ns / 1e9)
                for row in sums
            ),
        )


class _Asked(NamedTuple):
    """A dispatch in flight."""

    plan: Plan
    width: int


class StepExperts:
    """The `Experts` of steps that are captured by `ops`; by themselves they compute nothing."""

    only_launches = False

    def __init__(self, rings: StepRings, ops: CpuOps | None) -> None:
        self._rings = rings
        self._ops = ops

    def begin_step(self, step: int) -> None:
        """Nothing: `RingSteps` numbers them."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> _Asked:
        """See `workers.model.experts.Experts`."""
        assert self._ops is not None
        return _Asked(self._rings.ask(self._ops, layer, x_TD, expert_ids_TK, weights_TK), x_TD.shape[1])

    def combine(self, handle: _Asked) -> Tensor:
        """See `workers.model.experts.Experts`."""
        assert self._ops is not None
        return self._rings.collect(self._ops, handle.plan, handle.width)

    def by(self, ops: Ops) -> StepExperts | None:
        """The same, noted by `ops`."""
        return StepExperts(self._rings, ops) if isinstance(ops, CpuOps) else None

    def micro_batches(self, n_rows: int) -> int:
        """One: a step waits for each layer."""
        return 1
