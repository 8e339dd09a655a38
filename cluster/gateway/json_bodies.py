"""JSON bodies, read so that a large one holds nobody up.

Python's JSON reader is one call in C, in which nothing else runs: 90 ms for 2 MB of small numbers. Large bodies are
read in a thread by the reader in Python, from which the event loop gets its turn every few milliseconds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from json import decoder, scanner
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cluster.gateway.schemas.fields import CheckedIds

_LARGE = 128 * 1024  # bytes; less takes milliseconds at most
_MAX_SIZE = 100_000  # keys of all objects in a body, and lists
_MANY_IDS = 1000
_thread = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")  # one at a time: they share the time of the others


class JsonRequest(Request):
    """A request whose body is read beside the event loop where it is large."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _LARGE:
            return json.loads(body)
        return await asyncio.get_running_loop().run_in_executor(_thread, _read_large, body)


class JsonRoute(APIRoute):
    """A route whose endpoint gets a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class _Reader(json.JSONDecoder):
    """The reader in Python; the limit is for what garbage collections look at, in which nothing else runs either."""

    def __init__(self) -> None:
        self._size = 0
        super().__init__(object_pairs_hook=self._object)
        self.parse_object = decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array = self._array
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count(len(pairs))
        return dict(pairs)

    def _array(self, *arguments: Any) -> tuple[list[Any], int]:
        self._count(1)
        values, end = decoder.JSONArray(*arguments)  # type: ignore[attr-defined]
        return (CheckedIds(values), end) if len(values) >= _MANY_IDS and CheckedIds.can_be(values) else (values, end)

    def _count(self, more: int) -> None:
        self._size += more
        if self._size > _MAX_SIZE:
            raise json.JSONDecodeError(f"more than {_MAX_SIZE} keys and lists", "", 0)


def _read_large(body: bytes) -> Any:
    try:
        return _Reader().decode(body.decode(json.detect_encoding(body)))
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("not in UTF-8", "", error.start) from error
