"""How a gateway ends in good order: open requests finish, new ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# They cost nothing, and nobody waits for their end: pages follow `/live` for ever.
_OPEN_PATHS = ("/health", "/ready", "/version", "/metrics", "/live")


class Drain:
    """ASGI middleware: counts open requests; once `draining`, refuses new ones with 503.

    `on_idle` is called when the last open request ends while draining.
    """

    def __init__(self, app: ASGIApp, on_idle: Callable[[], None]) -> None:
        self._app = app
        self._on_idle = on_idle
        self.draining = False
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["path"] in _OPEN_PATHS and not self.draining):
            await self._app(scope, receive, send)
        elif self.draining and scope["path"] != "/health":
            await _refuse(send)
        else:
            self.open += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.open -= 1
                if self.draining and not self.open:
                    self._on_idle()


async def _refuse(send: Send) -> None:
    error = {"message": "The server is being stopped", "type": "server_error", "param": None, "code": "draining"}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"5"), (b"connection", b"close")]
    start: Message = {"type": "http.response.start", "status": 503, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
