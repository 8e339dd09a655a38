"""The HTTP endpoint at which one process shows its series."""

from __future__ import annotations

import errno
import logging

from prometheus_client import start_http_server
from prometheus_client.registry import Collector

from cluster.observe.exposition import registry_of

log = logging.getLogger(__name__)

_RANGE = 64  # processes of one machine that can have ports in a row


class Endpoint:
    """Serves the series of `collector` at `url` from a daemon thread, which works only while it is scraped."""

    def __init__(self, collector: Collector, host: str, first_port: int = 0) -> None:
        """`first_port`: the first free port from there on; 0: any. OSError when there is none."""
        registry = registry_of(collector)
        for port in range(first_port, first_port + (_RANGE if first_port else 1)):
            try:
                self._server, _ = start_http_server(port, host, registry)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == first_port + _RANGE - 1:
                    raise
        self.port = self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def serve(collector: Collector, host: str, first_port: int) -> str | None:
    """The URL at which the series are served until the process ends; None, and a warning, where that is impossible: a
    process without metrics is better than none."""
    try:
        return Endpoint(collector, host, first_port).url
    except OSError as error:
        log.warning("no metrics: cannot listen on %s:%d: %s", host, first_port, error)
        return None
