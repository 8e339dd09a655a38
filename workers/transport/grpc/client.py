"""The router's side of the gRPC transport: one stream to each expert worker, used by the step loop's own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from workers.errors import ExpertMeshError, WireError, WorkerLost
from workers.transport.base import FastWay, Received, Rows, Tag
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.handshake import Hello
from workers.transport.grpc.link import Link
from workers.transport.grpc.pulse import SILENT_AFTER_S, Pulse
from workers.transport.grpc.stream import StreamBroken
from workers.transport.threads import serve_thread

_WATCH_S = 0.05
_OVERDUE_S = 0.1  # a reply that takes longer is reason enough to ask whether its worker lives


class GrpcTransport:
    """A `Transport` over the Exchange stream of every worker. Addresses are `host:port`.

    Where both ends of a stream can do so, rows take a faster way, and the stream says when the other end is gone.
    Nobody but the step loop waits for bytes; a watchdog cancels the stream whose reply is overdue, or whose worker does
    not answer any more. So lateness costs the stream, and `connect` opens the next one.
    """

    def __init__(
        self,
        router: str,
        model: str,
        credentials: Credentials,
        *,
        epoch: Callable[[], int] = int,
        ways: Sequence[FastWay] = (),
        greet_timeout_s: float = 10.0,
        silent_after_s: float = SILENT_AFTER_S,
        on_reach: Callable[[], None] = lambda: None,
    ) -> None:
        """router: who this is. model: `Checkpoint.fingerprint`. epoch: of the placement in force.

        greet_timeout_s: how long a worker may take to answer its first call; silent_after_s: its process a health
        check. on_reach: called, by a thread of its own, when `unreachable` has changed.
        """
        self.dropped_replies = 0
        self._hello = Hello("", router, model)
        self._credentials = credentials
        self._epoch = epoch
        self._ways = ways
        self._greet_timeout_s = greet_timeout_s
        self._silent_after_s = silent_after_s
        self._on_reach = on_reach
        self._links: dict[str, Link] = {}
        self._pulses: dict[str, Pulse] = {}
        self._failed: dict[str, str] = {}  # workers to whom no stream could be opened, and why
        self._closed = threading.Event()
        serve_thread(self._watch, "exchange-watchdog")

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""
        link = self._links.get(worker)
        if link is not None and link.is_whole and link.stream.address == address:
            return
        self._unlink(worker)
        hello = replace(self._hello, worker=worker, epoch=self._epoch())
        try:
            pulse = self._feel(worker, address)
            self._links[worker] = Link(
                worker, address, self._credentials, hello, self._ways, self._greet_timeout_s, pulse.hurry
            )
        except ExpertMeshError as error:
            self._failed[worker] = str(error)

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""
        self._unlink(worker)
        if (pulse := self._pulses.pop(worker, None)) is not None:
            pulse.close()

    def answers(self, worker: str) -> bool:
        """Whether `worker` would answer, as far as is known: its process does, and the stream to it is whole."""
        link, pulse = self._links.get(worker), self._pulses.get(worker)
        is_open = link is not None and link.is_whole and link.is_open
        return is_open and pulse is not None and pulse.answers is True

    @property
    def unreachable(self) -> Mapping[str, str]:
        """Workers whose process does not answer, and at which address. From any thread."""
        return {worker: pulse.address for worker, pulse in list(self._pulses.items()) if pulse.answers is False}

    def room(self, worker: str, n_bytes: int) -> memoryview | None:
        """Where the faster way to `worker` wants its next request."""
        link = self._links.get(worker)
        return None if link is None else link.room(n_bytes)

    def way(self, worker: str) -> str:
        """The faster way that both took, or "grpc"."""
        link = self._links.get(worker)
        return "grpc" if link is None else link.way

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows`; only the first ones wait, until the worker has said that it is the one.

        Raises WorkerLost when the stream is known to be broken.
        """
        try:
            self._link(worker).send(rows)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """The reply to the rows sent with `tag`; see `Transport.receive`."""
        link = self._link(worker)
        try:
            received, n_dropped = link.receive(tag, timeout_s, out_PD)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None
        except WireError as error:
            link.stream.cancel(f"malformed reply: {error}")
            raise WorkerLost(worker, f"malformed reply: {error}") from error
        self.dropped_replies += n_dropped
        return received

    def close(self) -> None:
        """Close every stream."""
        self._closed.set()
        for worker in list(self._links):
            self.disconnect(worker)

    def _unlink(self, worker: str) -> None:
        self._failed.pop(worker, None)
        link = self._links.pop(worker, None)
        if link is not None:
            link.close()

    def _feel(self, worker: str, address: str) -> Pulse:
        """The pulse of the worker at `address`. Raises ExpertMeshError without its TLS files."""
        pulse = self._pulses.get(worker)
        if pulse is None or pulse.address != address:
            if pulse is not None:
                pulse.close()
            pulse = self._pulses[worker] = Pulse(address, self._credentials, self._silent_after_s)
        return pulse

    def _link(self, worker: str) -> Link:
        link = self._links.get(worker)
        if link is None:
            raise WorkerLost(worker, self._failed.get(worker, "not connected"))
        return link

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_WATCH_S):
            now = time.monotonic()
            lag_s, last = now - last - _WATCH_S, now
            for link in list(self._links.values()):
                # Where it was us who stood still, what came meanwhile is to be read first.
                if lag_s < _WATCH_S:
                    link.stream.check_deadline()
                if now - link.waiting_since > _OVERDUE_S:
                    link.hurry()
            self._look(now, lag_s)

    def _look(self, now: float, lag_s: float) -> None:
        """Feel every pulse; the stream of a worker that falls silent ends."""
        changed = False
        for worker, pulse in list(self._pulses.items()):
            if not pulse.look(now, lag_s):
                continue
            changed = True
            link = self._links.get(worker)
            if pulse.answers is False and link is not None and link.stream.address == pulse.address:
                link.stream.cancel("its process does not answer")
        if changed:
            self._on_reach()
