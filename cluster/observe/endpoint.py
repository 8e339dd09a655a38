"""The HTTP endpoint of one process: its series for Prometheus, and for probes whether it lives and is ready."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector

from cluster.observe.exposition import registry_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

_RANGE = 64  # processes of one machine that can have ports in a row


class Endpoint:
    """Serves from a daemon thread, which works only while it is asked: `/metrics` the series of `collector`, `/health`
    200, `/ready` 200 while `state()` is "ready", else 503."""

    def __init__(self, collector: Collector, host: str, first_port: int = 0, state: Callable[[], str] = str) -> None:
        """`first_port`: the first free port from there on; 0: any. OSError when there is none."""
        self._metrics: Any = make_wsgi_app(registry_of(collector), disable_compression=True)
        self._state = state
        self._server = _listen(self._answer, host, first_port)
        self.port = self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"].rstrip("/")
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start)
            return answer
        state = self._state() if path == "/ready" else "alive"
        status = {"/health": "200 OK", "/ready": "200 OK" if state == "ready" else "503 Service Unavailable"}
        start(status.get(path, "404 Not Found"), [("Content-Type", "text/plain; charset=utf-8")])
        return [(state if path in status else "there is /metrics, /health and /ready").encode()]


class _Server(ThreadingWSGIServer):
    # A process that was restarted takes its port again, whatever connections of the one before linger there, so that a
    # probe of that port reaches it. A port that somebody listens on is taken all the same.
    allow_reuse_address = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each scrape would bury the others."""


def _listen(app: Any, host: str, first_port: int) -> WSGIServer:
    last = first_port + (_RANGE if first_port else 1)
    for port in range(first_port, last):
        try:
            return make_server(host, port, app, _Server, _SilentHandler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == last - 1:
                raise
    raise AssertionError


def serve(collector: Collector, host: str, first_port: int, state: Callable[[], str]) -> str | None:
    """The URL at which `Endpoint` serves until the process ends; None, and a warning, where that is impossible: a
    process without metrics is better than none."""
    try:
        return Endpoint(collector, host, first_port, state).url
    except OSError as error:
        log.warning("no metrics: cannot listen on %s:%d: %s", host, first_port, error)
        return None
