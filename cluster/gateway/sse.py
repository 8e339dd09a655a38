"""Answers that end when their client does, as one JSON document or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from json.encoder import encode_basestring_ascii
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import RequestError
from cluster.gateway.http_errors import envelope, internal_error

log = logging.getLogger(__name__)

_CHUNK = 128  # items of a list that are written at once; no fewer than an answer may have choices
DONE = b"data: [DONE]\n\n"


def dump(value: Any) -> str:
    """JSON, compact, and in ASCII: some clients take U+2028 or U+0085 inside an event for the end of a line."""
    return json.dumps(value, separators=(",", ":"))


def dump_large(value: Any) -> str:
    """The same in pieces, so that other threads get a turn between them: one call to the writer in C is one turn."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{dump(str(key))}:{dump_large(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list) and len(value) <= _CHUNK:
        return "[" + ",".join(map(dump_large, value)) + "]"
    if isinstance(value, list):
        return "[" + ",".join(dump(value[i : i + _CHUNK])[1:-1] for i in range(0, len(value), _CHUNK)) + "]"
    return dump(value)


def event(value: Any) -> bytes:
    return f"data: {dump(value)}\n\n".encode("ascii")


def error_event(error: RequestError) -> bytes:
    """An error as OpenAI's streams end with it."""
    return event(envelope(error))


class TextEvents:
    """Events that differ in one string only: what is around it is written once per sequence, not once per token."""

    __slots__ = ("_head", "_tail")

    def __init__(self, template: Any, hole: str):
        """`template` holds the string `hole` exactly once, as a value."""
        self._head, self._tail = f"data: {dump(template)}\n\n".split(dump(hole))

    def event(self, text: str) -> bytes:
        return (self._head + encode_basestring_ascii(text) + self._tail).encode("ascii")


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_client(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it, and wait for its end, as soon as the client is gone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_client_leaves(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        gone = not task.done()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
    if not gone:
        task.result()


class JsonAnswer(Response):
    """The JSON document that `work` comes to."""

    media_type = "application/json"

    def __init__(self, work: Awaitable[bytes]):
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            await Response(await self._work, media_type=self.media_type)(scope, receive, send)

        await _with_client(receive, run())


class EventStream(Response):
    """The events of `events`, as they come.

    The response begins with the first of them, so that a request refused before it has its proper status. Later
    there is no status to change: the error is an event, the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, done: bytes, error: Callable[[RequestError], bytes]):
        """`done` follows the last event; `error` writes the one that a broken stream ends with."""
        self._done = done
        self._error = error
        self.status_code = 200
        self.background = None
        # No proxy between here and the client may wait for more before it passes an event on.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _with_client(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                last = self._done
            except RequestError as error:
                last = self._error(error)
            except Exception:
                log.exception("a stream broke off")
                last = self._error(internal_error())
            await send({"type": "http.response.body", "body": last, "more_body": False})
