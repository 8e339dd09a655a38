"""Catches a partition that lets bytes through, one that loses or doubles them once it is over, and a proxy that leads
to where a worker was before."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from cluster.fleet.fault_proxy import FaultProxy


class Echo:
    """Answers every line with a name of its own before it."""

    def __init__(self, name: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._name = name
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as lines:
            for line in lines:
                lines.write(self._name + line)
                lines.flush()


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    proxy = FaultProxy()
    yield proxy
    proxy.close()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_bytes_pass_but_for_a_partition_and_come_whole_after_it(proxy: FaultProxy) -> None:
    a, b = Echo(b"a:"), Echo(b"b:")
    addresses = proxy.through({"a": a.address, "b": b.address})
    assert addresses == proxy.through({"a": a.address, "b": b.address}), "the way stays while the worker does"
    open_before, other = connect(addresses["a"]), connect(addresses["b"])
    open_before.sendall(b"1\n")
    assert open_before.recv(100) == b"a:1\n"
    proxy.partition("a", 0.6)
    during = connect(addresses["a"])
    for each in (open_before, during):
        each.sendall(b"2\n")
        each.settimeout(0.2)
        with pytest.raises(TimeoutError):
            each.recv(100)
        each.settimeout(10)
    other.sendall(b"3\n")
    assert other.recv(100) == b"b:3\n", "only one worker is cut off"
    assert open_before.recv(100) == b"a:2\n" and during.recv(100) == b"a:2\n"


def test_a_worker_that_came_back_elsewhere_is_found_there_and_a_dead_one_refuses(proxy: FaultProxy) -> None:
    first, second = Echo(b"1:"), Echo(b"2:")
    before = proxy.through({"a": first.address})["a"]
    after = proxy.through({"a": second.address})["a"]
    assert before != after
    way = connect(after)
    way.sendall(b"x\n")
    assert way.recv(100) == b"2:x\n"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"127.0.0.1:{closed.getsockname()[1]}"
    lost = connect(proxy.through({"b": nowhere})["b"])
    with pytest.raises(ConnectionError):  # reset, as by a process that has died
        if not lost.recv(100):
            raise ConnectionError
    with pytest.raises(KeyError):
        proxy.partition("c", 1)
