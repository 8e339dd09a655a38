"""The worker's end of a pair: a thread computes what comes in the router's ring, into a ring of its own.

Legend: T token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from workers import wire
from workers.errors import WireError
from workers.kernels.ops import Rings
from workers.kernels.threads import limit_threads
from workers.transport.base import Declined
from workers.transport.batcher import Batcher
from workers.transport.shm.memory import NAME, NotShared
from workers.transport.shm.ring import COUNTS, RING_BYTES, InRing, Message, OutRing, signed
from workers.transport.threads import serve_thread
from workers.wire import HEADER_BYTES, Header, Request

_ERROR_BYTES = 4096


class ShmAcceptor:
    """Takes every offer of shared memory that can be opened from here. An `Acceptor`."""

    name = NAME

    def __init__(self, batcher: Batcher) -> None:
        """Made by a thread that computes on as many threads as lanes shall."""
        self._batcher = batcher
        self._threads = torch.get_num_threads()

    def accept(self, offer: str, router: str, end: Callable[[str], None]) -> Lane:
        """Raises Declined."""
        try:
            return Lane(offer, router, self._batcher, self._threads, end)
        except NotShared as error:
            raise Declined(str(error)) from None


class Lane:
    """Answers one router. What other routers ask meanwhile for the same layer is one batch with it (`Batcher`)."""

    def __init__(self, offer: str, router: str, batcher: Batcher, threads: int, end: Callable[[str], None]) -> None:
        """`offer`: what the router says of its ring. `end` is called, in the lane's thread, when the router writes
        what makes no sense. Raises NotShared."""
        self._requests = InRing(offer)
        self._replies = OutRing()
        self.text = self._replies.memory.name
        self._batcher = batcher
        self._threads = threads
        self._end = end
        self._cores = len(os.sched_getaffinity(0))
        rings = Rings(self._requests.address, self._replies.memory.address, RING_BYTES)
        self._loop = batcher.loop(rings, threads, self._cores)
        self._begin: int | None = None  # of the reply that is being written
        self._is_closed = False
        self._name = f"shm-{router}"

    def start(self) -> None:
        """Answer from now on."""
        serve_thread(self._run, self._name)

    def close(self) -> None:
        """The router is gone, or shall go. From any thread; does not wait for what is being computed."""
        self._is_closed = True
        if self._loop is not None:
            self._loop.close()
        self._requests.rouse()

    def _run(self) -> None:
        torch.get_num_threads()  # torch sets a thread up when it is first asked, which would undo a limit
        try:
            while not self._is_closed:
                if self._requests.wait():
                    self._replies.memory.forget_file()  # the router has opened it
                    self._answer_by_kernels()
                    if self._requests.wait() and not self._is_closed:
                        self._answer(self._requests.next())
        except WireError as error:
            self._end(str(error))
        finally:
            self._replies.memory.forget_file()

    def _answer_by_kernels(self) -> None:
        """What comes, until they leave a request to Python, or to the batcher."""
        if self._loop is not None:
            received, freed = self._loop.run(signed(self._requests.received), signed(self._replies.freed))
            self._requests.received, self._replies.freed = received % COUNTS, freed % COUNTS

    def _answer(self, message: Message) -> None:
        self._replies.free(self._requests.done)
        # Workers that are asked at once share the cores; one that is asked alone has them all.
        limit_threads(max(1, min(self._threads, self._cores // message.asked)))
        header, request = _parse(message.content)
        reply, _ = self._room(HEADER_BYTES + header.n_pairs * header.width * header.dtype.itemsize)
        out_PD = torch.frombuffer(reply, dtype=header.dtype, offset=HEADER_BYTES).view(-1, header.width)
        result = self._batcher.respond(header, request, lambda: not self._is_closed, out_PD)
        if isinstance(result, tuple):
            y_PD, compute_ns = result
            if y_PD is not out_PD:
                out_PD.copy_(y_PD)
            reply[:HEADER_BYTES] = wire.reply_head(header.tag, header.n_tokens, y_PD, compute_ns)
            self._publish(len(reply))
        elif result is not None:
            error = wire.error_message(header.tag, result, _ERROR_BYTES)
            self._room(len(error))[0][:] = error
            self._publish(len(error))

    def _room(self, n_bytes: int) -> tuple[memoryview, int]:
        """Where the next reply is to be written, and its address. Raises WireError: the router takes no replies."""
        self._begin = begin = self._replies.room(n_bytes)
        if begin is None:
            raise WireError("more is asked for, but replies are not taken in")
        return self._replies.view(begin, n_bytes), self._replies.address(begin)

    def _publish(self, n_bytes: int) -> None:
        assert self._begin is not None
        self._replies.publish(self._begin, n_bytes)


def _parse(content: memoryview) -> tuple[Header, Request]:
    """The rows stay in the ring; what is checked is copied first, as the router could change it afterwards."""
    header = wire.parse_head(bytes(content[:HEADER_BYTES]))
    wire.check_request(header)
    if header.payload_bytes != len(content) - HEADER_BYTES:
        raise WireError(f"{header.payload_bytes} bytes announced in a message of {len(content)}")
    n_rows = header.n_tokens * header.width
    x_TD = torch.frombuffer(content, dtype=header.dtype, count=n_rows, offset=HEADER_BYTES)
    pairs = content[HEADER_BYTES + x_TD.nbytes :]
    return header, wire.with_rows(header, x_TD.view(header.n_tokens, header.width), memoryview(bytes(pairs)))
