"""The stream to one expert worker, the faster way that both ends took, and what is in flight on either."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from workers import wire
from workers.errors import ExpertMeshError, WireError, WorkerLost
from workers.transport.base import FastWay, Offered, Pair, Received, Rows, Tag
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.handshake import Hello, key
from workers.transport.grpc.stream import Stream, StreamBroken
from workers.wire import HEADER_BYTES, Frame, Header

_log = logging.getLogger(__name__)


class Link:
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
        self._words: Future[dict[str, str]] = Future()  # the worker's first ones
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
        self.stream.deadline = time.monotonic() + greet_timeout_s
        threading.Thread(target=self._hear, name=f"greeting of {worker}", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the worker has answered the call, so that sending waits for nothing."""
        return self._words.done()

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
        """Wait for the worker's first words, and settle on the way that it takes. Raises StreamBroken."""
        words = self._words.result()
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

    def _hear(self) -> None:
        """In a thread of its own: the step loop, which has other workers too, should not wait for a process that has
        only just started."""
        try:
            words = self.stream.greeting()
        except StreamBroken as broken:
            self._words.set_exception(broken)
        except Exception as error:  # of ours; the step loop would wait for these words for ever
            _log.exception("greeting of worker %s", self._worker)
            self._words.set_exception(StreamBroken(f"its greeting failed: {error}"))
        else:
            self.stream.deadline = math.inf
            self._words.set_result(words)

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
