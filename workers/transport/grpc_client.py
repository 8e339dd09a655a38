"""The router's side of the gRPC transport: one stream to each expert worker, used by the step loop's own thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable

from torch import Tensor

from workers import wire
from workers.errors import WireError, WorkerLost
from workers.transport.base import Rows, Tag
from workers.transport.grpc_stream import Stream, StreamBroken

_WATCH_S = 0.05


class GrpcTransport:
    """A `Transport` over the Exchange stream of every worker. Addresses are `host:port`.

    Nobody but the step loop waits for bytes; a watchdog cancels the stream whose reply is overdue. So lateness costs
    the stream, and `connect` opens the next one.
    """

    def __init__(self, send_timeout_s: float = 10.0) -> None:
        """`send_timeout_s`: how long a worker may take to accept the frames of a message larger than one frame."""
        self.dropped_replies = 0
        self._send_timeout_s = send_timeout_s
        self._streams: dict[str, Stream] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="exchange-watchdog", daemon=True).start()

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""
        stream = self._streams.get(worker)
        if stream is None or stream.broken is not None or stream.address != address:
            self.disconnect(worker)
            self._streams[worker] = Stream(address)

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""
        stream = self._streams.pop(worker, None)
        if stream is not None:
            stream.close()

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows`; waits only while a worker takes in what is larger than one frame.

        Raises WorkerLost when the stream is known to be broken.
        """
        stream = self._stream(worker)
        try:
            for frame in _frames(rows):
                stream.write(frame, self._send_timeout_s)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> int:
        """Write the reply to the rows sent with `tag` into `out_PD`; see `Transport.receive`."""
        stream = self._stream(worker)
        stream.deadline = time.monotonic() + timeout_s
        try:
            return self._receive(worker, stream, tag, out_PD)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None
        except WireError as error:
            stream.close()
            raise WorkerLost(worker, f"malformed reply: {error}") from error
        finally:
            stream.deadline = math.inf

    def close(self) -> None:
        """Close every stream."""
        self._closed.set()
        for worker in list(self._streams):
            self.disconnect(worker)

    def _receive(self, worker: str, stream: Stream, tag: Tag, out_PD: Tensor) -> int:
        while True:
            first = stream.read()
            header = wire.parse(first)
            if header.tag == tag:
                break
            self.dropped_replies += 1
            wire.skip(header, first, stream.read)
        if header.kind == wire.ERROR:
            raise WorkerLost(worker, f"refused the rows: {bytes(wire.payload(header, first, stream.read)).decode()}")
        if (header.n_pairs, header.width, header.dtype) != (*out_PD.shape, out_PD.dtype):
            raise WireError(f"{header.n_pairs} rows of {header.width} {header.dtype}, awaited: {tuple(out_PD.shape)}")
        host_PD = out_PD if out_PD.is_cpu else out_PD.new_empty(out_PD.shape, device="cpu")
        wire.fill(wire.raw(host_PD), first, stream.read)
        if host_PD is not out_PD:
            out_PD.copy_(host_PD)
        return header.compute_ns

    def _stream(self, worker: str) -> Stream:
        stream = self._streams.get(worker)
        if stream is None:
            raise WorkerLost(worker, "not connected")
        return stream

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            now = time.monotonic()
            for stream in list(self._streams.values()):
                if stream.deadline < now:
                    stream.cancel("no answer within the deadline")


def _frames(rows: Rows) -> Iterable[bytes]:
    if rows.message is not None:
        return (bytes(rows.message),)
    x_TD, token_P, expert_P = rows.request
    return wire.request_frames(rows.tag, x_TD.cpu(), token_P, expert_P)
