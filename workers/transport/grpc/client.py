"""The router's side of the gRPC transport: one stream to each expert worker, used by the step loop's own thread."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from workers import wire
from workers.errors import WireError, WorkerLost
from workers.transport.base import Rows, Tag
from workers.transport.grpc.stream import Awaited, Stream, StreamBroken


class GrpcTransport:
    """A `Transport` over the Exchange stream of every worker. Addresses are `host:port`.

    A reply that is late costs the stream, and `connect` opens the next one.
    """

    def __init__(self, send_timeout_s: float = 10.0) -> None:
        """`send_timeout_s`: how long a worker may take to accept a frame of a message larger than one frame."""
        self.dropped_replies = 0
        self._send_timeout_s = send_timeout_s
        self._streams: dict[str, Stream] = {}

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""
        stream = self._streams.get(worker)
        if stream is None or stream.broken is not None or stream.address != address:
            self.disconnect(worker)
            self._streams[worker] = Stream(address, self._drop)

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""
        stream = self._streams.pop(worker, None)
        if stream is not None:
            stream.close()

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows`; waits only while a worker takes in what is larger than one frame.

        Raises WorkerLost when the stream is known to be broken.
        """
        stream, frames = self._stream(worker), _frames(rows)
        try:
            stream.write(frames, self._send_timeout_s)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None
        except WireError as error:
            raise _malformed(worker, stream, error) from error

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> int:
        """Write the reply to the rows sent with `tag` into `out_PD`; see `Transport.receive`."""
        stream = self._stream(worker)
        host_PD = out_PD if out_PD.is_cpu else out_PD.new_empty(out_PD.shape, device="cpu")
        try:
            answer = stream.read(Awaited(tag, out_PD.shape, out_PD.dtype, wire.raw(host_PD)), timeout_s)
        except StreamBroken as broken:
            raise WorkerLost(worker, str(broken)) from None
        except WireError as error:
            raise _malformed(worker, stream, error) from error
        if answer.refusal is not None:
            raise WorkerLost(worker, f"refused the rows: {answer.refusal}")
        if host_PD is not out_PD:
            out_PD.copy_(host_PD)
        return answer.compute_ns

    def close(self) -> None:
        """Close every stream, from any thread."""
        for stream in tuple(self._streams.values()):
            stream.shut()

    def _stream(self, worker: str) -> Stream:
        stream = self._streams.get(worker)
        if stream is None:
            raise WorkerLost(worker, "not connected")
        return stream

    def _drop(self) -> None:
        self.dropped_replies += 1


def _frames(rows: Rows) -> Iterable[wire.Frame]:
    if rows.message is not None:
        return ((rows.message,),)
    x_TD, token_P, expert_P = rows.request
    return wire.request_frames(rows.tag, x_TD.cpu(), token_P, expert_P)


def _malformed(worker: str, stream: Stream, error: WireError) -> WorkerLost:
    stream.close()
    return WorkerLost(worker, f"malformed reply: {error}")
