"""The router's side of the gRPC transport: one stream to each expert worker, used by the step loop's own thread."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workers import wire
from workers.errors import ExpertMeshError, WireError, WorkerLost
from workers.transport.base import FastWay, Offered, Pair, Received, Rows, Tag
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.handshake import Hello, key
from workers.transport.grpc.pulse import Pulse
from workers.transport.grpc.stream import Stream, StreamBroken
from workers.wire import HEADER_BYTES, Frame, Header

_log = logging.getLogger(__name__)
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
        on_reach: Callable[[], None] = lambda: None,
    ) -> None:
        """router: who this is. model: `Checkpoint.fingerprint`. epoch: of the placement in force.

        greet_timeout_s: how long a worker may take to answer its first call. on_reach: called, by a thread of its own,
        when `unreachable` has changed.
        """
        self.dropped_replies = 0
        self._hello = Hello("", router, model)
        self._credentials = credentials
        self._epoch = epoch
        self._ways = ways
        self._greet_timeout_s = greet_timeout_s
        self._on_reach = on_reach
        self._links: dict[str, _Link] = {}
        self._pulses: dict[str, Pulse] = {}
        self._failed: dict[str, str] = {}  # workers to whom no stream could be opened, and why
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="exchange-watchdog", daemon=True).start()

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""
        link = self._links.get(worker)
        if link is not None and link.is_whole and link.stream.address == address:
            return
        self._unlink(worker)
        hello = replace(self._hello, worker=worker, epoch=self._epoch())
        try:
            pulse = self._feel(worker, address)
            self._links[worker] = _Link(
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
        return link is not None and link.is_whole and pulse is not None and pulse.answers is True

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
            pulse = self._pulses[worker] = Pulse(address, self._credentials)
        return pulse

    def _link(self, worker: str) -> _Link:
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
            if pulse.answers is False and link is not None:
                link.stream.cancel("its process does not answer")
        if changed:
            self._on_reach()


class _Link:
    """The stream to one worker, the faster way that both took, and what is in flight on either."""

    def __init__(
        self,
        worker: str,
        address: str,
        credentials: Credentials,
        hello: Hello,
        ways: Sequence[FastWay],
        greet_timeout_s: float,
        hurry: Callable[[], None],
    ) -> None:
        """hurry: lets somebody find out soon whether the worker lives."""
        self.waiting_since = math.inf  # time.monotonic()
        self.hurry = hurry
        self._worker = worker
        self._greet_timeout_s = greet_timeout_s
        self._pair: Pair | None = None
        self.way = "grpc"
        self._is_greeted = False
        self._in_flight: deque[tuple[Tag, bool]] = deque()  # what was sent, and whether the faster way
        made = ((way.name, way.offer(worker)) for way in ways)
        self._offers: dict[str, Offered] = {name: offered for name, offered in made if offered is not None}
        words = tuple((key(name, "offer"), offered.text) for name, offered in self._offers.items())
        try:
            self.stream = Stream(address, credentials, hello, words, self._ended)
        except ExpertMeshError:
            self._withdraw()
            raise

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is known to be broken."""
        return self.stream.broken is None and (self._pair is None or self._pair.lost is None)

    def room(self, n_bytes: int) -> memoryview | None:
        """Where the faster way wants the next request."""
        return None if self._pair is None else self._pair.room(n_bytes)

    def send(self, rows: Rows) -> None:
        """Raises StreamBroken, or WorkerLost."""
        if not self._is_greeted:
            self._greet()
        is_fast = self._pair is not None and self.stream.broken is None and self._pair.send(rows)
        if not is_fast:
            for frame in _frames(rows):
                self.stream.write(frame)
        self._in_flight.append((rows.tag, is_fast))

    def receive(self, tag: Tag, timeout_s: float, out_PD: Tensor) -> tuple[Received, int]:
        """The reply, and how many replies came that nobody awaited any more.

        Raises StreamBroken, WireError or WorkerLost.
        """
        is_fast, found = False, False
        while self._in_flight and not found:
            sent, is_fast = self._in_flight.popleft()
            found = sent == tag
        self.waiting_since = time.monotonic()
        try:
            if found and is_fast:
                assert self._pair is not None
                dropped = self._pair.dropped_replies
                return self._pair.receive(tag, timeout_s, out_PD), self._pair.dropped_replies - dropped
            self.stream.deadline = self.waiting_since + timeout_s
            compute_ns, n_dropped = self._read(tag, out_PD)
            return Received(out_PD, compute_ns), n_dropped
        finally:
            self.stream.deadline = self.waiting_since = math.inf

    def close(self) -> None:
        """End the stream, and with it the faster way."""
        self.stream.close()
        if self._pair is not None:
            self._pair.close()
            self._pair = None  # or its memory would stay as long as the circle of stream and link
        self._withdraw()

    def _greet(self) -> None:
        """Wait for the worker's first words, and settle on the way that it takes."""
        self.stream.deadline = time.monotonic() + self._greet_timeout_s
        try:
            words = self.stream.greeting()
        finally:
            self.stream.deadline = math.inf
        for name, offered in self._offers.items():
            if (text := words.get(key(name, "accept"))) is not None:
                try:
                    self._pair = offered.accepted(text)
                except OSError as error:
                    _log.warning("worker %s: rows go over gRPC, not %s: %s", self._worker, name, error)
                else:
                    self.way = name
                    del self._offers[name]
                    break
            elif (why := words.get(key(name, "declined"))) is not None:
                _log.info("worker %s: rows go over gRPC, not %s: %s", self._worker, name, why)
        self._withdraw()
        self._is_greeted = True
        if self._pair is not None and self.stream.broken is not None:
            self._pair.broken(self.stream.broken)

    def _withdraw(self) -> None:
        while self._offers:
            self._offers.popitem()[1].close()

    def _ended(self, reason: str) -> None:
        if self._pair is not None:
            self._pair.broken(reason)
        self.hurry()

    def _read(self, tag: Tag, out_PD: Tensor) -> tuple[int, int]:
        shape, n_dropped = tuple(out_PD.shape), 0
        while True:
            first = memoryview(self.stream.read())
            if out_PD.is_cpu and len(first) >= HEADER_BYTES:
                compute_ns = wire.reply_ns(first, len(first), tag, shape, out_PD.dtype)
                if compute_ns is not None:
                    wire.raw(out_PD)[:] = first[HEADER_BYTES:]
                    return compute_ns, n_dropped
            header = wire.parse_head(first)
            if header.tag == tag:
                break
            for _ in self._pieces(header, first):
                pass
            n_dropped += 1
        if header.kind == wire.ERROR:
            text = b"".join(self._pieces(header, first)).decode(errors="replace")
            raise WorkerLost(self._worker, f"refused the rows: {text}")
        if (header.kind, header.n_pairs, header.width, header.dtype) != (wire.REPLY, *shape, out_PD.dtype):
            raise WireError(f"{header.n_pairs} rows of {header.width} {header.dtype}, awaited: {shape}")
        host_PD = out_PD if out_PD.is_cpu else torch.empty(shape, dtype=out_PD.dtype)
        target, at = wire.raw(host_PD), 0
        for piece in self._pieces(header, first):
            target[at : at + len(piece)] = piece
            at += len(piece)
        if host_PD is not out_PD:
            out_PD.copy_(host_PD)
        return header.compute_ns, n_dropped

    def _pieces(self, header: Header, first: memoryview) -> Iterator[memoryview]:
        """The payload of a message, frame by frame. Raises WireError when it is longer or shorter than announced."""
        left = HEADER_BYTES + header.payload_bytes
        wire.check_frame(len(first), left)
        left -= len(first)
        yield first[HEADER_BYTES:]
        while left:
            frame = memoryview(self.stream.read())
            wire.check_frame(len(frame), left)
            left -= len(frame)
            yield frame


def _frames(rows: Rows) -> Iterable[Frame]:
    """The frames of a request; it lies in host memory if it was laid out, else wherever its tensors are."""
    if rows.message is not None:
        return ((rows.message,),)
    x_TD, token_P, expert_P = rows.request
    return wire.request_frames(rows.tag, x_TD.cpu(), token_P, expert_P)
