"""The expert worker's end of the exchange through device memory: routers that join, and a thread that computes steps.

Legend: M routers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.device import end_if_lost
from workers.errors import DeviceError
from workers.kernels.cuda.graphs import capture
from workers.kernels.sizes import powers_up_to
from workers.transport.device import memory
from workers.transport.device.agreement import PAGE_BYTES, Step, Words, WorkerSide
from workers.transport.device.offer import Offer, Shape
from workers.transport.device.rows import StepRows
from workers.transport.device.way import words
from workers.transport.device.worker import Shard, StepWorker
from workers.transport.shm.memory import NotShared, OwnMemory, PeerMemory
from workers.transport.threads import serve_thread

_log = logging.getLogger(__name__)

_SPINS = 20_000  # looks at the pages before the thread begins to sleep between them
_NAP_S = 0.0005


#: Pairs of a step, and the nanoseconds in which they were computed: those in which no router was waited for.
Computed = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """A router that has shared its rows."""

    number: int  # its own
    me: int  # what it calls this worker
    page: PeerMemory
    memory: memory.Memory
    rows: StepRows

    @property
    def words(self) -> Words:
        """What it asks for."""
        return words(self.page)


class DeviceServer:
    """Steps of all routers of this host that joined, on one shard. Handshakes come from any thread."""

    name = "device"

    def __init__(self, shard: Shard, limit_s: float, computed: Computed = lambda n_pairs, spent_ns: None) -> None:
        """limit_s: how long a step waits for a router before it is void. computed: is told of each step. Raises
        NotShared."""
        self._shard = shard
        self._computed = computed
        self._limit_s = limit_s
        self._page = OwnMemory(PAGE_BYTES)
        self._side = WorkerSide(words(self._page))
        self._routers: dict[int, Joined] = {}
        self._lock = threading.Lock()
        self._changed = False
        self._stopping = False
        self._thread = serve_thread(self._serve, "device steps")

    def accept(self, offer: str, router: str) -> Joining:
        """Map the rows of `router`. Raises DeviceError saying why not."""
        said = Offer.parse(offer)
        shape, shard = said.shape, self._shard
        ours = Shape(shard.n_layers, shard.n_experts, shape.top_k, shard.hidden_size, shard.dtype, shape.n_rows)
        if shape != ours:
            raise DeviceError(f"router {router} has another model, or another dtype")
        if said.device != shard.device.type:
            raise DeviceError(f"rows are in the memory of a {said.device}, experts on a {shard.device.type}")
        try:
            page = PeerMemory(said.page, PAGE_BYTES)
        except NotShared as error:
            raise DeviceError(str(error)) from None
        mapped = memory.peer(said.rows, shape.layout.n_bytes, shard.device)
        joined = Joined(said.router, said.worker, page, mapped, StepRows(mapped.bytes, shape.layout))
        return Joining(self, joined, self._page.name)

    def join(self, router: Joined) -> None:
        """Steps of `router` are waited for from now on."""
        with self._lock:
            self._routers[router.number] = router
            self._changed = True

    def leave(self, router: Joined) -> None:
        """`router` is gone, or its stream broke."""
        with self._lock:
            if self._routers.get(router.number) is router:
                del self._routers[router.number]
                self._changed = True

    def close(self) -> None:
        """End the thread."""
        self._stopping = True
        self._thread.join(5)
        self._page.forget_file()

    def _serve(self) -> None:
        steps: _Steps | None = None
        idle = 0
        if self._shard.device.type == "cuda":
            torch.cuda.set_device(self._shard.device)  # each thread has one of its own
        with torch.inference_mode():
            while not self._stopping:
                if self._changed:
                    steps = self._prepare(steps)
                step = None if steps is None else self._next(steps)
                if step is None:
                    idle += 1
                    if idle > _SPINS or steps is None:
                        time.sleep(_NAP_S)
                    continue
                idle = 0
                assert steps is not None
                self._side.ended(step.number, steps.run(step))

    def _prepare(self, before: _Steps | None) -> _Steps | None:
        """Ready for the routers that are there now; `before`: for those that were."""
        with self._lock:
            routers, self._changed = dict(self._routers), False
        self._side.ready(())
        known = {} if before is None else before.routers
        del before
        for number, router in known.items():
            if routers.get(number) is not router:
                router.memory.close()
        for number, router in routers.items():
            if known.get(number) is not router:
                self._side.joined(number, router.words)
        if not routers:
            return None
        try:
            steps = _Steps(self._shard, routers, self._limit_s, self._computed)
        except Exception as error:  # of the card or its driver: rows come over the stream then
            end_if_lost(self._shard.device, error)
            _log.exception("steps of %d routers cannot be captured; their rows come over gRPC", len(routers))
            return None
        self._side.ready(routers)
        return steps

    def _next(self, steps: _Steps) -> Step | None:
        pages = {number: router.words for number, router in steps.routers.items()}
        conducts = any(self._side.is_conductor(router.words, router.me) for router in steps.routers.values())
        return self._side.conduct(pages, time.monotonic()) if conducts else self._side.follow(pages)


class Joining:
    """A router that may join."""

    def __init__(self, server: DeviceServer, router: Joined, text: str) -> None:
        self.text = text
        self._server, self._router = server, router

    def start(self) -> None:
        """The router was told."""
        self._server.join(self._router)

    def close(self) -> None:
        """Its stream ended."""
        self._server.leave(self._router)


class _Steps:
    """The steps of a set of routers: on a GPU captured, one graph for each number of rows."""

    def __init__(self, shard: Shard, routers: dict[int, Joined], limit_s: float, computed: Computed) -> None:
        self.routers = routers
        self._computed = computed
        shape = next(iter(routers.values())).rows.layout
        most = max(router.rows.layout.n_rows for router in routers.values())
        self._at = {number: at for at, number in enumerate(routers)}
        self._worker = StepWorker(shard, memory.launch(shard.device, limit_s), len(routers), most, shape.top_k)
        self._runs = {n_rows: self._make(n_rows) for n_rows in powers_up_to(most)}

    def run(self, step: Step) -> bool:
        """One step; whether it was void."""
        n_rows = next(n for n in self._runs if n >= min(step.n_rows, max(self._runs)))
        self._worker.begin_step(step.number, [self._at[number] for number in step.routers if number in self._at])
        began = time.perf_counter_ns()
        self._runs[n_rows]()
        report = self._worker.read()
        self._computed(report.n_pairs, max(0, time.perf_counter_ns() - began - report.waited_ns))
        return report.is_void

    def _make(self, n_rows: int) -> Callable[[], None]:
        parts = {self._at[number]: (router.rows, router.me) for number, router in self.routers.items()}

        def run() -> None:
            self._worker.run(parts, n_rows)

        return captured(run, lambda: self._worker.begin_step(0, ())) if self._worker.on_gpu else run


def captured(run: Callable[[], None], begin: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph. `begin` makes a run do nothing: it is run once before, which compiles its kernels."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        begin()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, _ = capture(run)
    return graph.replay
