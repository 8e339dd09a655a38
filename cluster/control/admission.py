"""Who is let in at the admin API, asked before anything of a body is read."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN = ("/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc")  # documentation says nothing of the cluster
_MOST_BYTES = 32 * 2**20  # a placement of 100,000 experts with three homes each has 10 MB


class Admission:
    """ASGI middleware: `Authorization: Bearer TOKEN` or 401, whatever else is wrong; 413 for a body beyond 32 MiB."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        shown = kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token)
        if not shown and scope["path"] not in _OPEN:
            said = {"detail": "the admin API needs the cluster's admin token"}
            await JSONResponse(said, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, _limited(receive), send)


def _limited(receive: Receive) -> Receive:
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MOST_BYTES:
            raise HTTPException(413, f"the body is larger than {_MOST_BYTES} bytes")
        return message

    return limited
