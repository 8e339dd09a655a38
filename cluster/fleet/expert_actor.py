"""ExpertWorker: the thin Ray shell around a shard and its server."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
import torch

from cluster.config import Config
from cluster.control.client import ControllerClient
from cluster.control.faults import Fault, inflict
from cluster.control.view import Member, State, View
from cluster.fleet.actor import checkpoint_here, loading, node_address, start_or_end
from cluster.fleet.metrics import serve_metrics
from cluster.fleet.shard_keeper import ShardKeeper
from cluster.fleet.weight_source import WeightSource
from cluster.fleet.worker_readings import Loads, WorkerReadings
from cluster.observe import logs
from cluster.observe.exposition import Reading
from cluster.placement.placement import Placement
from cluster.router.sizing import expert_format
from workers.checkpoint import Checkpoint
from workers.device import Capacity, capacity, compute_dtype, describe, pick, rows_device
from workers.kernels.threads import set_threads
from workers.shard import ExpertShard, load_shard
from workers.transport.base import Acceptor
from workers.transport.batcher import Batcher
from workers.transport.collective.group import Group
from workers.transport.collective.interface import bind_address
from workers.transport.collective.server import CollectiveServer
from workers.transport.device.acceptor import DeviceAcceptor
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import STEP_LIMIT_S
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.peer_weights import PeerWeights
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.worker import ShmAcceptor


class ExpertWorker:
    """A Ray async actor that holds a shard, serves it, and tells the controller where.

    The constructor's arguments and the controller's placement say everything: Ray restarts the actor with the same
    ones, and it comes back with the same experts at a new address.
    """

    def __init__(
        self, worker: str, config: Config, checkpoint: str, threads: int, controller: Any, credentials: Credentials
    ) -> None:
        """`checkpoint` is a directory; `controller` the handle of the actor that has `sync`. Returns at once."""
        logs.configure(config.log_level, config.log_format, worker)
        set_threads(threads)
        self._worker = worker
        self._config = config
        self._checkpoint = checkpoint
        self._credentials = credentials
        self._node = ray.get_runtime_context().get_node_id()
        self._gpu_ids = ray.get_gpu_ids()
        self._source: Checkpoint | None = None  # while it loads
        self._capacity = Capacity()
        self._device = torch.device("cpu")
        self._state: State = "starting"
        self._keeper: ShardKeeper | None = None
        self._weights: WeightSource | None = None
        self._view: View | None = None
        self._group: Group | None = None
        self._server: ExpertServer | CollectiveServer | None = None
        self._loads = Loads()
        self._shard: ExpertShard | None = None
        self._metrics_url = serve_metrics(
            config, worker, "expert", self._readings, epoch=self._epoch, state=lambda: self._state,
            device=lambda: describe(self._device),
        )  # fmt: skip
        self._first_view = asyncio.Event()
        self._membership = ControllerClient(controller, self._member, self._on_view)
        self._started = start_or_end(self._start(), worker)

    async def ready(self) -> str:
        """The address it serves at, once the shard is loaded; raises what went wrong, CheckpointError above all."""
        return await asyncio.shield(self._started)

    async def inflict(self, fault: Fault) -> None:
        """Do to this process what `expertmesh chaos` wants."""
        inflict(fault, os.getpid())

    async def _start(self) -> str:
        await self._first_view.wait()
        assert self._view is not None
        placement = self._view.placement
        shard, source = await asyncio.to_thread(self._load, placement)
        self._server = server = await asyncio.to_thread(self._make_server, shard, source)
        await asyncio.to_thread(server.start)
        self._weights = self._make_weights(shard, source)
        tell = self._membership.tell
        self._keeper = ShardKeeper(self._worker, shard, self._weights, placement.epoch, tell, self._loads)
        self._shard = shard
        self._source = None
        self._state = "ready"
        self._on_view(self._view)  # which may have changed meanwhile
        self._membership.tell()
        return server.address

    def _load(self, placement: Placement) -> tuple[ExpertShard, Checkpoint]:
        config = self._config
        self._device = device = pick(config.expert_device, self._gpu_ids)
        self._source = source = Checkpoint(
            checkpoint_here(self._checkpoint, config.model), device, finite=config.check_weights
        )
        dtype = compute_dtype(config.dtype, source.spec.dtype, device, config.router_device)
        began = time.perf_counter()
        share = config.gpus_per_expert_worker * config.gpu_memory_utilization
        n_slots = config.expert_slots or len(source.spec.experts)  # nobody holds an expert twice
        made = expert_format(source, dtype, device, config.expert_dtype)
        replica = made.expert_bytes(source.spec.hidden_size, source.spec.ffn_size)
        self._capacity = capacity(device, share, replica, n_slots)
        shard = load_shard(source, placement.shard(self._worker), dtype, made, self._capacity.slots)
        self._loads.add(shard.n_held, time.perf_counter() - began)
        shard.warm_up(config.max_batch_tokens * source.spec.top_k)
        return shard, source

    def _make_server(self, shard: ExpertShard, source: Checkpoint) -> ExpertServer | CollectiveServer:
        config = self._config
        if config.transport in ("device", "shm", "grpc"):
            return ExpertServer(
                shard,
                self._worker,
                node_address(),
                model=source.fingerprint(shard.dtype),
                epoch=self._epoch,
                credentials=self._credentials,
                ways=self._ways(shard),
            )
        host = bind_address(config.collective_interface, config.trusted_network, node_address())
        device = rows_device(shard.device, config.router_device, config.expert_device)
        return CollectiveServer(
            shard,
            self._worker,
            host,
            deadline_s=config.collective_deadline_s,
            device=device,
            steps=device.type == "cuda" and shard.only_launches,
            on_change=self._membership.tell,
        )

    def _make_weights(self, shard: ExpertShard, source: Checkpoint) -> WeightSource:
        """Where the weights of further experts come from. Workers ask each other over gRPC."""
        peers = None
        if self._config.transport != "collective":
            peers = PeerWeights(self._worker, source.fingerprint(shard.dtype), self._credentials)
        return WeightSource(self._config.weights, source, peers)

    def _ways(self, shard: ExpertShard) -> tuple[Callable[[Batcher], Acceptor], ...]:
        """The faster ways that routers may offer."""
        if self._config.transport == "shm":
            return (ShmAcceptor,)
        if self._config.transport != "device" or not shard.only_launches:
            return ()
        return (lambda batcher: DeviceAcceptor(DeviceServer(shard, STEP_LIMIT_S, batcher.stepped), StreamRows()),)

    def _on_view(self, view: View) -> None:
        self._group, self._view = view.group, view
        self._first_view.set()
        if self._keeper is not None:
            self._keeper.follow(view)
        if isinstance(self._server, CollectiveServer):
            self._server.join(view.group)
        if view.draining and self._state == "ready":
            self._state = "draining"
            assert self._server is not None
            self._server.drain()

    def _member(self) -> Member:
        server = self._server
        return Member(
            role="expert",
            id=self._worker,
            pid=os.getpid(),
            node=self._node,
            state=self._state,
            address="" if server is None else server.address,
            metrics_url=self._metrics_url,
            epoch=self._epoch(),
            group=self._group,
            broken=server.broken if isinstance(server, CollectiveServer) else 0,
            slots=self._slots(),
            most_slots=self._config.expert_slots or self._capacity.slots,
            bytes_per_s=self._capacity.bytes_per_s,
            preparation=None if self._keeper is None else self._keeper.preparation,
            detail=({} if self._weights is None else {"replicas_from_peers": self._weights.from_peers})
            | describe(self._device)
            | loading(self._source)
            | ({} if server is None else server.numbers()),
        )

    def _readings(self) -> Iterable[Reading]:
        """For the scrape's thread."""
        if self._shard is None or self._server is None:
            return ()
        return WorkerReadings(self._shard, self._server.batcher, self._loads, self._slots)()

    def _epoch(self) -> int:
        return 0 if self._keeper is None else self._keeper.epoch

    def _slots(self) -> int:
        """Experts it has room for: as configured, as its GPU has memory, or half more than an equal share."""
        config = self._config
        if config.expert_slots or self._capacity.slots or self._view is None:
            return config.expert_slots or self._capacity.slots
        # Where some have left or are drained, the others have room for what those held.
        n_started = config.expert_workers or 1
        placement, n_workers = self._view.placement, min(n_started, self._view.goal.n_holding or n_started)
        n_replicas = placement.n_layers * placement.n_experts * (1 + config.spare_replicas)
        return -(-3 * n_replicas // (2 * n_workers))
