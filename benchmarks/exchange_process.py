"""The processes of `benchmarks.exchange`: an expert worker whose experts cost nothing, bare gRPC echoes, a client.

`python -m benchmarks.exchange_process worker|echo` prints its address and serves until its standard input ends;
`... client WORKER ECHO shm|grpc` answers {"way": "exchange"|"echo"|"stored", "n_bytes": ..., "trips": ...}.

Legend: T token rows, P pairs, D hidden size, K experts a token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
import torch

from benchmarks.child import serve
from benchmarks.free_shard import FreeShard
from cluster.placement.placement import striped
from cluster.router.exchange.exchange import Exchange
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.router import ShmWay
from workers.transport.shm.worker import ShmAcceptor
from workers.wire import FRAME_BYTES

HIDDEN_SIZE = 512
ROW_BYTES = 4 * HIDDEN_SIZE  # float32
CREDENTIALS = Credentials("free experts have no secrets")
_TIMEOUT_S = 60.0
_END = b"\1"  # ends the last frame of an echoed message; the others end in zeros


def worker() -> None:
    """Serve the free expert."""
    server = ExpertServer(
        FreeShard(HIDDEN_SIZE), "worker", "127.0.0.1", model="free", credentials=CREDENTIALS, ways=(ShmAcceptor,)
    )
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop(0)


def echo() -> None:
    """Serve frames back: `echo` as they come, `stored` once the last one of a message has come, as an expert must."""
    server = grpc.server(ThreadPoolExecutor(4), options=_options())
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "echo": grpc.stream_stream_rpc_method_handler(lambda frames, context: frames),
        "stored": grpc.stream_stream_rpc_method_handler(_stored),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)


def _stored(frames: Iterator[bytes], context: object) -> Iterator[bytes]:
    message = []
    for frame in frames:
        message.append(frame)
        if frame.endswith(_END):
            yield from message
            message.clear()


def client(worker_address: str, echo_address: str, transport: str) -> Callable[[dict[str, Any]], Any]:
    """What measures, to be asked once for every run."""
    placement = striped(1, 1, ("worker",))
    over = Exchange(
        placement,
        {"worker": worker_address},
        GrpcTransport("router", "free", CREDENTIALS, ways=(ShmWay(),) if transport == "shm" else ()),
        reply_timeout_s=_TIMEOUT_S,
        rejoin_timeout_s=_TIMEOUT_S,
    )
    echoes = {way: _Echo(echo_address, way) for way in ("echo", "stored")}

    def answer(request: dict[str, Any]) -> dict[str, float]:
        rows = request["n_bytes"] // ROW_BYTES
        echo = echoes.get(request["way"])
        trip = _echo_trip(echo, rows) if echo else _exchange_trip(over, rows)
        trip()
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(request["trips"]):
            trip()
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return {"seconds": (ended - began) / request["trips"], "cpu_seconds": (cpu_ended - cpu) / request["trips"]}

    return answer


def _exchange_trip(over: Exchange, rows: int) -> Callable[[], object]:
    x_TD = torch.randn(rows, HIDDEN_SIZE)
    ids_TK, weights_TK = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)

    return lambda: over.combine(over.dispatch(0, x_TD, ids_TK, weights_TK))


def _echo_trip(echo: _Echo, rows: int) -> Callable[[], None]:
    content = bytes(rows * ROW_BYTES - len(_END)) + _END
    frames = [content[at : at + FRAME_BYTES] for at in range(0, len(content), FRAME_BYTES)]
    return lambda: echo.trip(frames)


class _Echo:
    """A stream of grpc's public API, used as its documentation shows."""

    def __init__(self, address: str, way: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_options())
        self._outbox: SimpleQueue[bytes] = SimpleQueue()
        call: Any = self._channel.stream_stream(f"/Bare/{way}")
        self._replies: Iterator[bytes] = call(iter(self._outbox.get, None))

    def trip(self, frames: list[bytes]) -> None:
        """Send all, then wait for all."""
        for frame in frames:
            self._outbox.put(frame)
        for _ in frames:
            next(self._replies)


def _options() -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", FRAME_BYTES), ("grpc.max_send_message_length", FRAME_BYTES)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "worker":
        worker()
    elif sys.argv[1] == "echo":
        echo()
    else:
        serve(lambda: client(*sys.argv[2:]))
