"""What every transport offers a router: rows out to expert workers, rows back.

Shape legend: T token rows of one part, P (token, expert) pairs of one part, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers import wire
from workers.errors import WorkerLost
from workers.wire import Tag

__all__ = ["Rows", "Tag", "Transport"]


class Rows:
    """One worker's part of a dispatch. A token row is there once, even if several of its experts live on the worker.

    Few rows are laid out as the request that carries them; `message` is that, ready to be sent, and the tensors lie in
    it. `message` is None where there are only tensors.
    """

    __slots__ = ("_request", "asked", "message", "n_pairs", "row_bytes", "tag")

    def __init__(self, tag: Tag, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> None:
        """x_TD: token rows, the model's compute dtype; token_P, which row each pair takes, and expert_P, which expert
        computes it, ascending: int32 in host memory."""
        self.tag = tag
        self.asked = 1  # how many workers are asked at once, this one included
        self.n_pairs = len(token_P)
        self.row_bytes = x_TD.shape[1] * x_TD.itemsize
        self.message: memoryview | None = None
        self._request: wire.Request | None = wire.Request(x_TD, token_P, expert_P)

    @classmethod
    def packed(cls, tag: Tag, message: memoryview, n_tokens: int, n_pairs: int, width: int, dtype: torch.dtype) -> Rows:
        """`message`: a whole request but for its header, which is written here."""
        rows = cls.__new__(cls)
        wire.put_request_head(message, tag, n_tokens, n_pairs, width, dtype)
        rows.tag, rows.n_pairs, rows.row_bytes = tag, n_pairs, dtype.itemsize * width
        rows.message, rows._request, rows.asked = message, None, 1
        return rows

    @property
    def request(self) -> wire.Request:
        """The tensors: x_TD, token_P, expert_P."""
        if self._request is None:
            assert self.message is not None
            self._request = wire.request(wire.parse_head(self.message), self.message[wire.HEADER_BYTES :])
        return self._request

    def detach(self) -> None:
        """What `message` lies in may be used otherwise from now on."""
        if self.message is not None:
            self.message, self._request = memoryview(bytes(self.message)), None

    @property
    def n_bytes(self) -> int:
        """What travels, without headers."""
        if self.message is not None:
            return len(self.message) - wire.HEADER_BYTES
        return sum(tensor.nbytes for tensor in self.request)


class Received(NamedTuple):
    """A reply: unweighted rows in the order of the pairs, and the nanoseconds that the worker computed."""

    rows_PD: Tensor
    compute_ns: int


class StepTraffic(NamedTuple):
    """What a captured step exchanged with one worker."""

    sent_bytes: int
    received_bytes: int
    waited_seconds: float
    compute_seconds: float  # as the worker says


class StepReport(NamedTuple):
    """What a captured step did. Legend: L layers, E experts."""

    rows_LE: NDArray[np.int64]  # pairs of each expert
    traffic: tuple[StepTraffic, ...] = ()  # of each worker, where the way knows it


class Transport(Protocol):
    """A router's way to its expert workers. Not thread-safe: the step loop owns it.

    Several requests to one worker may be in flight. It answers in the order they were sent, and replies are received
    in that order: whoever asks for a later one drops those before it.
    """

    dropped_replies: int  # replies that nobody awaited any more

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""

    def answers(self, worker: str) -> bool:
        """Whether `worker` would answer, as far as is known without waiting. Of use for one that failed."""

    @property
    def unreachable(self) -> Mapping[str, str]:
        """Workers known not to answer, though they may be there for others, and at which address. From any thread."""

    def room(self, worker: str, n_bytes: int) -> memoryview | None:
        """Where the next request to `worker`, of so many bytes, may be laid out, so that sending it copies nothing.
        None: anywhere."""

    def way(self, worker: str) -> str:
        """How rows travel to `worker` now: "grpc", "shm", "device" or "collective"."""

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows` and return at once. Raises WorkerLost when the stream is known to be broken."""

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """The reply to the rows sent with `tag`, in `out_PD` or in memory of the transport's own, which stays as it is
        until the next reply of this worker is received.

        out_PD is contiguous and has the dtype and device of the rows. Raises WorkerLost when the stream breaks,
        nothing came within `timeout_s`, or the worker refused the rows.
        """

    def close(self) -> None:
        """Close every stream."""


class Offered(Protocol):
    """A faster way that a router offers one worker, as its stream is opened."""

    text: str  # for the worker

    def accepted(self, text: str) -> Pair:
        """The worker takes it, and says `text`. Raises OSError where it cannot be used after all."""

    def close(self) -> None:
        """The worker declined, or the stream broke first."""


class FastWay(Protocol):
    """A faster way between two processes than the stream, chosen pair by pair in the handshake."""

    name: str

    def offer(self, worker: str) -> Offered | None:
        """None: this way is not for `worker`."""


class Pair(Protocol):
    """A faster way that both ends of a stream have taken. Its calls are those of `Transport`, for one worker."""

    dropped_replies: int
    lost: WorkerLost | None  # why nothing comes any more

    def room(self, n_bytes: int) -> memoryview | None:
        """Where the next request may be laid out."""

    def send(self, rows: Rows) -> bool:
        """False: the rows do not fit, and go over the stream. Raises WorkerLost."""

    def receive(self, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """The replies to what was sent this way come in the order of the requests. Raises WorkerLost."""

    def broken(self, reason: str) -> None:
        """The stream ended: who waits is let go at once. From any thread."""

    def close(self) -> None:
        """End it."""


class Declined(Exception):
    """A worker does not take an offer. The text says why, for people."""


class Accepted(Protocol):
    """The worker's end of a faster way."""

    text: str  # for the router

    def start(self) -> None:
        """The router has been told: serve."""

    def close(self) -> None:
        """The stream ended."""


class Acceptor(Protocol):
    """What takes offers of a faster way."""

    name: str

    def accept(self, offer: str, router: str, end: Callable[[str], None]) -> Accepted:
        """`end` closes the stream of a router whose bytes make no sense; from any thread. Raises Declined."""
