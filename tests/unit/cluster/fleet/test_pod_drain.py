"""Would catch a pod that ends while it answers, one that does not end at all, experts that nobody was asked to take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from cluster.fleet import pod_drain
from tests.text_handler import TextHandler


class _Server(ThreadingHTTPServer):
    """A process's endpoint, and the controller's admin API, at one port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.open = [2.0, 1.0, 0.0]  # requests, by the time it is asked
        self.asked: list[tuple[str, str]] = []
        self.status = 200


class _Handler(TextHandler):
    server: _Server

    def do_GET(self) -> None:
        n_open = self.server.open.pop(0) if len(self.server.open) > 1 else self.server.open[0]
        self.answer(
            200,
            f"# HELP expertmesh_requests_open x\nexpertmesh_requests_open {n_open}\n"
            'expertmesh_build_info{process="expert-3",version="0.1.0",role="expert"} 1\n',
        )

    def do_POST(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.answer(self.server.status, "{}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    with _Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(pod_drain, "METRICS_PORT", running.server_port)
        monkeypatch.setattr(pod_drain, "MOST_PROCESSES", 1)
        monkeypatch.setattr(pod_drain, "ADMIN_PORT", running.server_port)
        monkeypatch.setattr(pod_drain, "_TICK_S", 0.01)
        yield running
        running.shutdown()


def test_a_routers_pod_waits_for_its_requests_but_not_for_ever(server: _Server) -> None:
    assert pod_drain.drain_router("127.0.0.1", 60) == 0 and server.open == [0.0]
    server.open = [7.0]
    assert pod_drain.drain_router("127.0.0.1", 0.05) == 7


def test_an_experts_pod_asks_others_to_take_its_experts(server: _Server) -> None:
    assert pod_drain.drain_experts("127.0.0.1", "127.0.0.1", "secret", 5) == ["expert-3"]
    assert server.asked == [("/workers/expert-3/node/drain", "Bearer secret")]
    server.status = 409  # there is no room
    assert pod_drain.drain_experts("127.0.0.1", "127.0.0.1", "secret", 5) == []


def test_where_nobody_answers_a_pod_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_drain, "METRICS_PORT", 1)
    assert pod_drain.drain_router("127.0.0.1", 60) == 0
    assert pod_drain.drain_experts("127.0.0.1", "127.0.0.1", "secret", 60) == []
