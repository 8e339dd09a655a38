"""The expert worker's side of the collective transport: an ExpertShard in the groups that the worker is in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workers import wire
from workers.errors import WireError
from workers.shard import ExpertShard
from workers.transport.batcher import Batcher
from workers.transport.collective.blocks import BLOCK_BYTES, ERROR_BYTES, LEAVE, Buffers, as_bytes, fill, fits, view
from workers.transport.collective.group import Group
from workers.transport.collective.joiner import BUILD_S, Joiner, beat
from workers.transport.collective.mesh import Broken, Mesh
from workers.transport.collective.ranks import Lane
from workers.transport.collective.step_rows import StepWord
from workers.transport.collective.step_server import StepServer
from workers.transport.threads import serve_thread


class CollectiveServer:
    """Serves one shard to all routers of a group; of two groups, while one follows the other."""

    def __init__(
        self,
        shard: ExpertShard,
        worker: str,
        host: str,
        *,
        deadline_s: float = 2.0,
        device: torch.device | str = "cpu",
        steps: bool = False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Connections are bound to the interface of `host`. A router that takes no beat for `deadline_s` is lost.

        device: where the rows are, here and at the routers: a GPU where both ends are on one. steps: whether whole
        steps go over its groups too, as the routers say.

        on_change: called by some thread when a group became ready or broke. Raises RuntimeError when `host` is not an
        address of this machine.
        """
        self.ready = 0  # number of the newest group that was built
        #: One for every start of the process. Routers find it through the group, so nobody connects to it.
        self.address = f"{host}/{os.getpid()}"
        self._deadline_s = deadline_s
        self._shard = shard
        self._work = Work(Batcher(shard, device))
        self._lanes: list[RouterLane] = []
        self._joiner = Joiner(worker, host, torch.device(device), self._live, on_change, steps)

    @property
    def broken(self) -> int:
        """Number of the newest group that broke or could not be built; 0: none did."""
        return self._joiner.broken

    def join(self, group: Group | None) -> None:
        """Take part in `group` as soon as it is built. From any thread; returns at once, and may be repeated."""
        self._joiner.join(group)

    @property
    def batcher(self) -> Batcher:
        """What computes, and counts that."""
        return self._work.batcher

    def start(self) -> None:
        """Nothing to do: requests come with the first group."""

    def drain(self) -> None:
        """Nothing to do: the group that follows is formed without this worker."""

    def stop(self, grace_s: float) -> None:
        """Answer what has arrived (at most `grace_s` seconds), then end every group."""
        self._work.wait_until_idle(grace_s)
        self._joiner.close()

    def numbers(self) -> dict[str, object]:
        """For people: experts held, bytes, rows and seconds computed, the group and its routers."""
        return {
            "experts": self._shard.n_held,
            "weight_bytes": self._shard.weight_bytes,
            "rows": self._work.batcher.rows,
            "compute_seconds": round(self._work.batcher.compute_seconds, 3),
            "waited_seconds": round(self._work.batcher.waited_seconds, 3),
            "group": self.ready,
            "streams": len(self._lanes),
        }

    def _live(self, mesh: Mesh) -> None:
        """The life of a group, in a thread of its own: it lasts until every router has left."""
        lanes = {router: RouterLane(mesh, router, self._work, self._shard) for router in mesh.routers}
        threads = [serve_thread(lane.serve, "experts") for lane in lanes.values()]
        self._lanes.extend(lanes.values())
        self.ready = max(self.ready, mesh.group.number)
        self._joiner.changed()
        try:
            beat(mesh, lambda: [router for router, lane in lanes.items() if not lane.left], BUILD_S, self._deadline_s)
        except Broken as broken:
            mesh.fail(str(broken))
        finally:
            mesh.close()
            for thread in threads:
                thread.join()
            for lane in lanes.values():
                self._lanes.remove(lane)


class Work:
    """What the lanes of a worker share: its batcher, and how many requests are in hand."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self._idle = threading.Condition()
        self._in_hand = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request is in hand."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def wait_until_idle(self, timeout_s: float) -> None:
        """Return when no request is in hand, or the time is over."""
        with self._idle:
            self._idle.wait_for(lambda: self._in_hand == 0, timeout_s)

    def _add(self, requests: int) -> None:
        with self._idle:
            self._in_hand += requests
            self._idle.notify_all()


class RouterLane:
    """Serves the router of rank `router`."""

    def __init__(self, mesh: Mesh, router: int, work: Work, shard: ExpertShard) -> None:
        self.left = False  # the router said that it leaves: that it is gone means nothing
        self._mesh = mesh
        self._router = router
        self._work = work
        self._steps = StepServer(mesh, router, shard) if router in mesh.steps else None
        self._buffers = Buffers()
        self._blocks = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]

    def serve(self) -> None:
        """Answer every request, in order, until the router leaves or the group ends."""
        try:
            self._serve()
        except (Broken, WireError) as error:
            self._mesh.fail(f"{self._mesh.name(self._router)}: {error}")

    def _serve(self) -> None:
        this, other = self._blocks
        request = self._receive(this)
        while True:
            self._mesh.wait(request)
            if bytes(view(this)[: len(LEAVE)]) == LEAVE:
                break
            if (word := StepWord.parse(view(this))) is not None:
                request = self._receive(other)
                with self._work.one():
                    self._step(word)
                this, other = other, this
                continue
            header = wire.parse_head(view(this))
            asked, rest = self._request(header, this)
            # The next request finds its place while this one is computed.
            request = self._receive(other)
            with self._work.one():
                self._answer(header, asked)
            if rest is not None:
                self._buffers.give(rest)
            this, other = other, this
        self.left = True
        self._send(this[: len(LEAVE)])

    def _request(self, header: wire.Header, block: Tensor) -> tuple[wire.Request, Tensor | None]:
        """A request, and the buffer that it took unless it came with its header."""
        if fits(header.payload_bytes) and not self._mesh.rows_apart:
            return wire.request(header, view(block)[wire.HEADER_BYTES :][: header.payload_bytes]), None
        rows_bytes = header.n_tokens * header.width * header.dtype.itemsize
        rest = self._buffers.take(header.payload_bytes)
        rows, pairs = rest[:rows_bytes], rest[rows_bytes : header.payload_bytes]
        if self._mesh.rows_apart:
            rows = torch.empty(rows_bytes, dtype=torch.uint8, device=self._mesh.device)
        for work in (self._mesh.receive_rows(self._router, Lane.REQUEST, rows), self._receive(pairs)):
            self._mesh.wait(work)
        x_TD = rows.view(header.dtype).view(header.n_tokens, header.width)
        return wire.with_rows(header, x_TD, view(pairs)), rest

    def _step(self, word: StepWord) -> None:
        if self._steps is None:
            raise WireError("a step, which this group knows nothing of")
        self._send(torch.frombuffer(self._steps.run(word, BUILD_S).pack(), dtype=torch.uint8))

    def _answer(self, header: wire.Header, request: wire.Request) -> None:
        result = self._work.batcher.respond(header, request, lambda: self._mesh.broken is None)
        if isinstance(result, str):
            self._reply(wire.error_message(header.tag, result, ERROR_BYTES))
        elif result is not None:
            y_PD, compute_ns = result
            self._reply(wire.reply_head(header.tag, header.n_tokens, y_PD, compute_ns), y_PD)

    def _reply(self, head: bytes, *rows: Tensor) -> None:
        """Send a message: its head, and at most one tensor of rows."""
        in_one = fits(sum(tensor.nbytes for tensor in rows)) and not self._mesh.rows_apart
        block = self._buffers.take(len(head) + sum(tensor.nbytes for tensor in rows) if in_one else len(head))
        works = [self._mesh.send(self._router, Lane.REPLY, fill(block, head, *(rows if in_one else ())))]
        if not in_one:
            works += [self._mesh.send_rows(self._router, Lane.REPLY, as_bytes(tensor)) for tensor in rows]
        for work in works:
            self._mesh.wait(work)
        self._buffers.give(block)

    def _receive(self, block: Tensor) -> Any:
        return self._mesh.receive(self._router, Lane.REQUEST, block)

    def _send(self, block: Tensor) -> None:
        self._mesh.wait(self._mesh.send(self._router, Lane.REPLY, block))
