"""Keeps the shard of an expert worker in step with the placements that the controller tells of."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from cluster.control.view import Preparation, View
from cluster.fleet.weight_source import WeightSource
from cluster.fleet.worker_readings import Loads
from cluster.router.memory import check_memory
from workers.kernels.memory import give_back
from workers.probe import Probe, probe
from workers.shard import ExpertShard

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


class ShardKeeper:
    """Loads what a placement in force or to come wants of `worker`, and unloads what none that is in use wants.

    Lives in an asyncio loop; reads and frees weights in a thread while the shard computes. `on_change` is called when
    `epoch` or `preparation` is another.
    """

    def __init__(
        self,
        worker: str,
        shard: ExpertShard,
        source: WeightSource,
        epoch: int,
        on_change: Callable[[], None],
        loads: Loads | None = None,
    ) -> None:
        """`loads`: counts what is loaded."""
        self.epoch = epoch  # of the newest placement of which everything is here
        self.preparation: Preparation | None = None
        self._worker = worker
        self._shard = shard
        self._source = source
        self._loads = loads or Loads()
        self._on_change = on_change
        self._view: View | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.get_event_loop().create_task(self._run())

    def follow(self, view: View) -> None:
        """Bring the shard to what `view` wants, soon."""
        self._view = view
        self._changed.set()

    @property
    def held(self) -> frozenset[tuple[int, int]]:
        """The (layer, expert) pairs that are here."""
        return self._shard.held

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            assert self._view is not None
            try:
                await asyncio.to_thread(self._apply, self._view)
            except Exception:  # of what is in force: routers wait for it, so it is tried for ever
                _log.exception("%s cannot hold what placement %d wants", self._worker, self._view.placement.epoch)
                await asyncio.sleep(_RETRY_S)
                self._changed.set()
            self._on_change()

    def _apply(self, view: View) -> None:
        wanted = frozenset(view.placement.shard(self._worker))
        self._load(wanted, view)
        self.epoch = view.placement.epoch
        if view.next is None:
            self.preparation = None
            if view.acknowledged:
                self._unload(self.held - wanted)
        elif self.preparation is None or self.preparation.epoch != view.next.epoch or self.preparation.error:
            self.preparation = self._prepare(view)

    def _prepare(self, view: View) -> Preparation:
        """Load what the next placement adds, and probe every expert that gets a replica and is here."""
        assert view.next is not None
        try:
            self._load(view.next.shard(self._worker), view)
            before, after = view.placement.all_replicas(), view.next.all_replicas()
            tested = {(replica.layer, replica.expert) for replica in after - before}
            probes: dict[tuple[int, int], Probe] = {
                (layer, expert): probe(self._shard, layer, expert) for layer, expert in sorted(tested & self.held)
            }
        except Exception as error:
            _log.exception("%s cannot hold what placement %d wants", self._worker, view.next.epoch)
            return Preparation(view.next.epoch, {}, str(error) or type(error).__name__)
        return Preparation(view.next.epoch, probes)

    def _load(self, experts: Iterable[tuple[int, int]], view: View) -> None:
        missing = sorted(frozenset(experts) - self.held)
        if missing:
            check_memory({f"{len(missing)} experts": len(missing) * self._shard.expert_bytes}, self._shard.device)
        addresses = view.addresses("expert")
        try:
            for layer, expert in missing:
                holders = view.placement.holders(layer, expert)
                others = {w: addresses[w] for w in holders if w != self._worker and w in addresses}
                began = time.perf_counter()
                self._source.load(self._shard, layer, expert, others)
                self._loads.add(1, time.perf_counter() - began)
        finally:
            if missing:
                self._source.rest()

    def _unload(self, experts: Iterable[tuple[int, int]]) -> None:
        unwanted = sorted(experts)
        for layer, expert in unwanted:
            self._shard.unload(layer, expert)
        if unwanted:
            give_back()
