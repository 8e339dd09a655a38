"""Serve writes an `x-request-id` of its own beside the one that the gateway has checked."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NAME = b"x-request-id"


class OneRequestId:
    """ASGI middleware around Serve's: of several request ids of an answer the first stays, the gateway's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower(), value) for name, value in message["headers"]]
                ours = next((value for name, value in headers if name == _NAME), None)
                if ours is not None:
                    headers = [(name, value) for name, value in headers if name != _NAME]
                    message["headers"] = [*headers, (_NAME, ours)]
            await send(message)

        await self._app(scope, receive, send_one)
