"""Would catch a Job that ends while nobody serves: told to a head that is replaced, or to one that refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from cluster.fleet import serve_deploy
from cluster.fleet.serve_deploy import Refused, deploy
from tests.text_handler import TextHandler

CONFIG = {"applications": [{"name": "expertmesh", "import_path": "a:b"}]}


class _Head(ThreadingHTTPServer):
    """Answers each GET by the next of `states`, the last one for ever: a status, "" for no application, or an error."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.states: list[str | int] = []
        self.put = 200
        self.told: list[tuple[object, str | None]] = []
        self.asked: list[str | int] = []


class _Handler(TextHandler):
    server: _Head

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append((json.loads(body), self.headers["Authorization"]))
        self.answer(self.server.put, "an option of no name")

    def do_GET(self) -> None:
        states = self.server.states
        state = states.pop(0) if len(states) > 1 else states[0]
        self.server.asked.append(state)
        if isinstance(state, int):
            self.answer(state, "")
            return
        application = {"expertmesh": {"status": state, "message": "no such model"}} if state else {}
        self.answer(200, json.dumps({"applications": application}))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Head]:
    monkeypatch.setattr(serve_deploy, "_TICK_S", 0.01)
    with _Head() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_head_that_is_replaced_is_told_again(head: _Head) -> None:
    head.states = ["RUNNING", "RUNNING", 503, "", "DEPLOYING", "RUNNING"]
    deploy(f"http://127.0.0.1:{head.server_port}", CONFIG, "a-token", settled_s=0.3)
    assert head.told == [(CONFIG, "Bearer a-token")] * 3, "at first, after no answer, and where it was not known"
    assert head.asked[:6] == ["RUNNING", "RUNNING", 503, "", "DEPLOYING", "RUNNING"] and len(head.asked) > 6


def test_what_the_cluster_refuses_is_said(head: _Head) -> None:
    address = f"http://127.0.0.1:{head.server_port}"
    head.states = ["DEPLOYING", "DEPLOY_FAILED"]
    with pytest.raises(Refused, match="expertmesh: no such model"):
        deploy(address, CONFIG)
    head.put = 400
    with pytest.raises(Refused, match="an option of no name"):
        deploy(address, CONFIG)
