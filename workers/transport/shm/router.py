"""The router's end of a pair: requests are laid out in its own ring, replies are read in the worker's.

Legend: P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import MutableMapping
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers import wire
from workers.errors import WireError, WorkerLost
from workers.kernels.cpu.arguments import RingPair
from workers.transport.base import Received, Rows, Tag
from workers.transport.shm.memory import NAME, NotShared
from workers.transport.shm.ring import COUNTS, InRing, OutRing, signed

_log = logging.getLogger(__name__)
_RECEIVED, _ASKED, _LOST, _MEAN_NS = map(RingPair._fields.index, ("received", "asked", "lost", "mean_ns"))


class ShmWay:
    """Offers shared memory to every worker. A `FastWay`."""

    name = NAME

    def __init__(self) -> None:
        self._said = False
        #: The newest pair of each worker that took it.
        self.pairs: WeakValueDictionary[str, Pair] = WeakValueDictionary()

    def offer(self, worker: str) -> Offered | None:
        """None where this system has no such memory, which is said once."""
        try:
            return Offered(worker, self.pairs)
        except NotShared as error:
            if not self._said:
                _log.warning("rows go over gRPC, not through shared memory: %s", error)
                self._said = True
            return None


class Offered:
    """A ring that waits for the worker to open it."""

    def __init__(self, worker: str, pairs: MutableMapping[str, Pair]) -> None:
        """`pairs`: where the pair is noted. Raises NotShared."""
        self._worker = worker
        self._pairs = pairs
        self._requests = OutRing()
        self.text = self._requests.memory.name

    def accepted(self, text: str) -> Pair:
        """The pair, from what the worker says of its ring. Raises NotShared."""
        try:
            self._pairs[self._worker] = pair = Pair(self._worker, self._requests, InRing(text))
            return pair
        finally:
            self.close()

    def close(self) -> None:
        """Nobody will open the ring any more."""
        self._requests.memory.forget_file()


class Pair:
    """Two rings. The step loop's, but for `broken`."""

    def __init__(self, worker: str, requests: OutRing, replies: InRing) -> None:
        self.dropped_replies = 0
        self._worker = worker
        self._requests = requests
        self._replies = replies
        self._in_flight: deque[Rows | None] = deque()  # None: of a step that is void
        self._room: tuple[memoryview, int] | None = None  # what was given last, and where it is
        self.lost: WorkerLost | None = None
        self._lent: NDArray[np.int64] | None = None  # to the kernels of a captured step
        self._mean_ns = 0  # that they waited for a reply of late

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight, and nothing broken."""
        return self.lost is None and not self._requests.n_taken and not self._in_flight

    def lend(self, row: NDArray[np.int64]) -> None:
        """Let the kernels of a step use the rings: `row` is what they know of them, a `RingPair`."""
        requests, replies = self._requests.address(0), self._replies.address
        row[:4] = requests, replies, signed(self._replies.received), False
        row[_MEAN_NS] = self._mean_ns
        self._lent = row
        row[_LOST] = self.lost is not None  # whoever breaks the pair from now on finds the row

    def take_back(self) -> None:
        """The step is over: go on behind its messages. A reply that is still to come is nobody's."""
        assert self._lent is not None
        row, self._lent = self._lent, None
        self._replies.received = self._requests.freed = int(row[_RECEIVED]) % COUNTS
        self._mean_ns = int(row[_MEAN_NS])
        if row[_ASKED]:
            self._in_flight.append(None)

    def room(self, n_bytes: int) -> memoryview | None:
        """Where the next request may be laid out; None: too much is in flight."""
        begin = self._requests.room(n_bytes)
        if begin is None:
            return None
        self._room = self._requests.view(begin, n_bytes), begin
        return self._room[0]

    def send(self, rows: Rows) -> bool:
        """Hand over `rows`; false: there is no room for them. Raises WorkerLost."""
        if self.lost is not None:
            raise self.lost
        is_there = self._room is not None and rows.message is self._room[0]
        if not is_there and not self._lay_out(rows):
            return False
        assert self._room is not None
        view, begin = self._room
        self._requests.publish(begin, len(view), rows.asked)
        self._in_flight.append(rows)
        self._room = None
        return True

    def receive(self, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """The reply to `tag`; its rows lie in the ring until the next call, or in `out_PD` where that is on a device.

        Raises WorkerLost, as `Transport.receive` does.
        """
        try:
            received = self._receive(tag, time.monotonic() + timeout_s, tuple(out_PD.shape), out_PD.dtype)
            return received if out_PD.is_cpu else Received(out_PD.copy_(received.rows_PD), received.compute_ns)
        except WireError as error:
            self.broken(f"malformed reply: {error}")
        except TimeoutError:
            self.broken("no answer within the deadline")
        assert self.lost is not None
        raise self.lost

    def broken(self, reason: str) -> None:
        """There will be no further replies; who waits gets WorkerLost. From any thread."""
        self.lost = self.lost or WorkerLost(self._worker, reason)
        if (row := self._lent) is not None:
            row[_LOST] = True
        self._replies.rouse()

    def close(self) -> None:
        """Nobody uses the pair any more."""
        self.broken("closed")

    def _receive(self, tag: Tag, deadline: float, shape: tuple[int, ...], dtype: torch.dtype) -> Received:
        replies, requests = self._replies, self._requests
        while True:
            while not replies.wait():
                if self.lost is not None:
                    raise self.lost
                if time.monotonic() > deadline:
                    raise TimeoutError
            requests.done(replies.received)  # whoever had the rows before asks for the next ones
            message = replies.next()
            if not self._in_flight:
                raise WireError("a reply to nothing")
            rows = self._in_flight.popleft()
            requests.free(replies.received)
            # A copy: what is checked here cannot change afterwards.
            head = bytes(message.content[: wire.HEADER_BYTES])
            compute_ns = wire.reply_ns(head, len(message.content), tag, shape, dtype)
            if compute_ns is not None:
                content = message.content[wire.HEADER_BYTES :]
                return Received(torch.frombuffer(content, dtype=dtype).view(shape), compute_ns)
            self._look_at_unexpected(head, message.content, tag, rows)

    def _look_at_unexpected(self, head: bytes, content: memoryview, tag: Tag, rows: Rows | None) -> None:
        header = wire.parse_head(head)
        if header.tag != tag:
            self.dropped_replies += 1
            return
        if header.kind != wire.ERROR or header.payload_bytes != len(content) - wire.HEADER_BYTES:
            raise WireError(f"{header.n_pairs} rows of {header.width} {header.dtype} in {len(content)} bytes")
        if rows is not None:
            rows.detach()
        text = bytes(content[wire.HEADER_BYTES :]).decode(errors="replace")
        raise WorkerLost(self._worker, f"refused the rows: {text}")

    def _lay_out(self, rows: Rows) -> bool:
        if rows.message is not None:
            parts: tuple[memoryview, ...] = (rows.message,)
        else:
            x_TD, token_P, expert_P = rows.request
            head, _ = wire.request_head(rows.tag, x_TD, len(token_P))
            parts = (memoryview(head), *map(wire.raw, (x_TD.cpu(), token_P, expert_P)))
        view = self.room(sum(map(len, parts)))
        if view is None:
            return False
        at = 0
        for part in parts:
            view[at : at + len(part)] = part
            at += len(part)
        return True
