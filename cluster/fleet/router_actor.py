"""The router's Ray shell: an engine, its gRPC service, and the loop that keeps both in step with the controller."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, cast

import ray

from cluster.config import Config
from cluster.control.client import ControllerClient
from cluster.control.faults import Fault, inflict
from cluster.control.view import Member, State, View
from cluster.errors import TraceError
from cluster.fleet.actor import checkpoint_here, loading, node_address, start_or_end
from cluster.fleet.fault_proxy import FaultProxy
from cluster.fleet.metrics import serve_metrics
from cluster.observe import logs, tracing
from cluster.observe.exposition import Reading
from workers.transport.grpc.credentials import Credentials

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # torch and gRPC are imported while the controller is already being told that this router is there
    import torch

    from cluster.placement.load import Load, LoadMeter
    from cluster.router.engine import Engine
    from cluster.router.exchange.exchange import Exchange
    from cluster.router.service import GenerationService
    from cluster.routing.recorder import RoutingTrace
    from workers.checkpoint import Checkpoint
    from workers.transport.collective.client import CollectiveTransport


_ACKNOWLEDGE_S = 0.01  # between two looks at what is in flight, after a new placement


class Router:
    """One router. A Ray async actor; whatever it needs to come back after a crash is in its constructor."""

    def __init__(
        self, router_id: str, config: Config, checkpoint: str, threads: int, controller: Any, credentials: Credentials
    ) -> None:
        logs.configure(config.log_level, config.log_format, router_id)
        tracing.configure(config.otlp_traces_endpoint, router_id, config.cluster_name or "")
        self._id = router_id
        self._config = config
        self._checkpoint = checkpoint
        self._credentials = credentials
        self._threads = threads
        self._host = node_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._gpu_ids = ray.get_gpu_ids()
        self._device: torch.device | None = None
        self._source: Checkpoint | None = None  # while it loads
        self._view: View | None = None
        self._first_view = asyncio.Event()
        self._changes: set[asyncio.Task[None]] = set()
        self._exchange: Exchange | None = None
        self._proxy = FaultProxy() if config.allow_chaos else None
        self._collective: CollectiveTransport | None = None
        self._store: object = None  # of the groups whose first router this one is; lives as long as the process
        self._store_address = ""
        self._engine: Engine | None = None
        self._own_load: LoadMeter | None = None  # of experts that this router holds itself
        self._service: GenerationService | None = None
        self._metrics_url = serve_metrics(
            config, router_id, "router", self._readings, epoch=self._epoch, state=self._state, device=self._describe
        )
        self._loop = asyncio.get_event_loop()
        self._membership = ControllerClient(controller, self._member, self._on_view)
        self._started = start_or_end(self._start(), router_id)

    async def ready(self) -> str:
        """The address it serves at, once the model is loaded; raises what went wrong."""
        return await asyncio.shield(self._started)

    async def inflict(self, fault: Fault) -> None:
        """Do to this process what `expertmesh chaos` wants. Raises KeyError for a worker that it does not know."""
        if fault.kind != "partition":
            inflict(fault, os.getpid())
        elif self._proxy is not None:
            await asyncio.to_thread(self._proxy.partition, fault.peer, fault.seconds)

    async def _start(self) -> str:
        await self._first_view.wait()
        self._engine = engine = await asyncio.to_thread(self._build)
        from cluster.router.admission import Admission
        from cluster.router.service import GenerationService

        self._source = None
        service = GenerationService(
            engine,
            self._host,
            credentials=self._credentials,
            router=self._id,
            state="starting",
            exchange=self._exchange,
            admission=Admission.of(self._config),
        )
        await service.start()
        self._service = service
        assert self._view is not None
        self._on_view(self._view)  # which may have changed while the exchange was made
        await self._follow_state()
        self._membership.tell()
        return service.address

    def _build(self) -> Engine:
        from cluster.fleet.router_transport import Shell, reach
        from cluster.placement.load import LoadMeter
        from cluster.router.build import build_engine
        from cluster.router.exchange.exchange import Exchange
        from workers.checkpoint import Checkpoint
        from workers.device import compute_dtype, pick
        from workers.kernels.threads import set_threads
        from workers.shard import ExpertShard

        set_threads(self._threads)
        self._device = pick(self._config.router_device, self._gpu_ids)
        checkpoint = checkpoint_here(self._checkpoint, self._config.model)
        self._source = source = Checkpoint(checkpoint, self._device, finite=self._config.check_weights)
        if self._config.transport == "local":
            engine = build_engine(self._config, source, trace=self._make_trace(source))
            if isinstance(shard := engine.model.experts, ExpertShard):
                self._own_load = LoadMeter(shard.rows_LE, lambda: {self._id: int(shard.rows_LE().sum())})
            return engine
        assert self._view is not None
        dtype = compute_dtype(self._config.dtype, source.spec.dtype, self._device, self._config.expert_device)
        shell = Shell(
            self._id, self._host, self._credentials, self._epoch, self._membership.tell, on_group=self._group_changed
        )
        reached = reach(self._config, source, shell)
        self._collective, self._store, self._store_address = reached[3:]
        self._exchange = exchange = Exchange(
            self._view.placement,
            self._addresses(self._view),
            reached.transport,
            reply_timeout_s=self._config.reply_timeout_s,
            rejoin_timeout_s=self._config.rejoin_timeout_s,
            device=self._device,
            dtype=dtype,
            rows_on=reached.rows_on,
            step_way=reached.step_way,
        )
        return build_engine(self._config, source, exchange, self._make_trace(source))

    def _make_trace(self, source: Checkpoint) -> RoutingTrace | None:
        """The file in which a sample of what the gates choose is counted, where one is asked for."""
        from cluster.routing.recorder import RoutingTrace
        from cluster.routing.trace import Header

        config, spec = self._config, source.spec
        if config.routing_trace is None or not spec.experts:
            return None
        header = Header(source.path.name, spec.n_layers, spec.n_experts, spec.top_k, config.routing_trace_sample)
        path = config.routing_trace / f"{self._id}.jsonl.gz"
        try:
            return RoutingTrace(path, self._id, header)
        except (OSError, TraceError) as error:
            log.error("no routing trace is written: %s", error)
            return None

    def _addresses(self, view: View) -> dict[str, str]:
        """Where this router finds the expert workers."""
        addresses = dict(view.addresses("expert"))
        return addresses if self._proxy is None else self._proxy.through(addresses)

    def _group_changed(self) -> None:
        """A group became ready or broke. From any thread."""
        self._loop.call_soon_threadsafe(self._on_group)

    def _on_group(self) -> None:
        # A step that waits for its workers hears of the group as of a new view; the controller, which forms the next
        # one, hears that it broke.
        if self._view is not None:
            self._on_view(self._view)
        self._membership.tell()

    def _on_view(self, view: View) -> None:
        self._view = view
        self._first_view.set()
        if self._collective is not None:
            self._collective.join(view.group)
        if self._exchange is not None:
            self._exchange.publish(view.placement, self._addresses(view))
            if self._exchange.epoch < view.placement.epoch:
                self._begin(self._acknowledge(view.placement.epoch))
        if self._service is not None:
            self._begin(self._follow_state())

    def _begin(self, change: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _acknowledge(self, epoch: int) -> None:
        """Tell the controller as soon as no dispatch under an older placement is in flight any more."""
        assert self._exchange is not None
        while self._exchange.epoch < epoch:  # noqa: ASYNC110 (the step loop waits for nobody)
            await asyncio.sleep(_ACKNOWLEDGE_S)
        self._membership.tell()

    async def _follow_state(self) -> None:
        """Ready once every worker can be reached: one that leaves later is waited for by the step that needs it.

        Workers of a cluster that is being stopped still answer, and a router restarted then has requests to finish.
        """
        if self._service is None or self._view is None:
            return
        if self._id in self._view.goal.leaving and self._service.state in ("ready", "isolated"):
            await self._service.set_state("draining")
            self._membership.tell()
        elif self._id in self._view.isolated and self._service.state == "ready":
            await self._service.isolate()
            self._membership.tell()
        elif self._id not in self._view.isolated and self._service.state == "isolated":
            await self._service.set_state("ready")
            self._membership.tell()
        if self._service.state != "starting":
            return
        if self._collective is not None and not self._collective.ready:
            return
        if self._exchange is None or self._view.complete:
            await self._service.set_state("ready")
            self._membership.tell()

    def _member(self) -> Member:
        return Member(
            role="router",
            id=self._id,
            pid=os.getpid(),
            node=self._node,
            state=cast(State, self._state()),
            metrics_url=self._metrics_url,
            address="" if self._service is None else self._service.address,
            epoch=self._epoch(),
            # Before it has loaded it would keep the others waiting.
            store="" if self._service is None else self._store_address,
            group=None if self._view is None else self._view.group,
            broken=0 if self._collective is None else self._collective.broken,
            unreachable=() if self._exchange is None else tuple(sorted(self._exchange.unreachable)),
            load=self._load(),
            detail=self._detail(),
        )

    def _state(self) -> str:
        return "starting" if self._service is None else self._service.state

    def _load(self) -> Load | None:
        """Rows by expert and by who computed them; None before the model is loaded."""
        if self._exchange is not None:
            return self._exchange.load()
        return None if self._own_load is None else self._own_load.read()

    def _readings(self) -> Iterable[Reading]:
        """For the scrape's thread."""
        if self._engine is None:
            return
        from cluster.router import readings

        yield from readings.of_engine(self._engine)
        per_expert = self._config.per_expert_metrics == "on"
        if self._exchange is not None:
            yield from readings.of_exchange(self._exchange, per_expert)
        elif per_expert:
            yield from readings.of_own_experts(self._engine)

    def _describe(self) -> dict[str, object]:
        """The device; nothing before it is known, when torch is not even imported."""
        if self._device is None:
            return {}
        from workers.device import describe

        return describe(self._device)

    def _detail(self) -> dict[str, object]:
        if self._device is None:
            return {}
        numbers = {} if self._service is None else self._service.numbers() | {"open": self._service.n_open}
        if self._exchange is not None and self._exchange.captures_steps:
            counters = self._exchange.counters
            numbers |= {"captured_steps": counters.captured_steps, "void_steps": counters.void_steps}
        return self._describe() | loading(self._source) | numbers

    def _epoch(self) -> int:
        if self._exchange is not None:
            return self._exchange.epoch
        return 0 if self._view is None else self._view.placement.epoch
