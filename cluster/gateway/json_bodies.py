"""JSON bodies, read so that a large one holds nobody up.

Python's JSON reader is one call in C, in which nothing else runs: 90 ms for 2 MB of small numbers. Large bodies are
read in a thread by the reader in Python, from which the event loop gets its turn every few milliseconds; since that one
takes 2 s for 3 MB of numbers, it hands lists of plain values to the reader in C, a few thousand at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from json import decoder, scanner
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cluster.gateway.schemas.fields import CheckedIds

_LARGE = 128 * 1024  # bytes; less takes milliseconds at most
_MAX_SIZE = 50_000  # lists, objects and their keys in a body
_MANY_IDS = 1000
# Plain values of a list, each with the comma after it: as many as the reader in C reads in less than a millisecond.
# Nothing here is tried in two ways (`+` after a quantifier), so that the time is linear in the length.
_STRING = r'"[^"\\]{0,60}+(?:\\.[^"\\]{0,60}+){0,3}+"'
_RUN = re.compile(rf'(?:[^"\[\]{{}},]{{0,60}}+(?:{_STRING}[ \t\n\r]*+)?+,){{1,2000}}+')
_ScanOnce = Callable[[str, int], tuple[Any, int]]
_thread = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")  # one at a time: they share the time of the others


class JsonRequest(Request):
    """A request whose body is read beside the event loop where it is large."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _LARGE:
            return _read(json.loads, body)
        return await asyncio.get_running_loop().run_in_executor(_thread, read_large, body)


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
        self._count(1 + len(pairs))
        return dict(pairs)

    def _array(self, place: tuple[str, int], scan_once: _ScanOnce) -> tuple[list[Any], int]:
        self._count(1)
        text, at = place[0], _after_space(*place)
        values: list[Any] = []
        are_ids, is_open = True, text[at : at + 1] != "]"
        while is_open:
            if (run := _RUN.match(text, at)) is not None:
                more, at = _plain(run), _after_space(text, run.end())
            else:
                more, at, is_open = _single(text, at, scan_once)
            values += more
            are_ids = are_ids and CheckedIds.can_be(more)
        if not values:
            at += 1
        return (CheckedIds(values) if are_ids and len(values) >= _MANY_IDS else values), at

    def _count(self, more: int) -> None:
        self._size += more
        if self._size > _MAX_SIZE:
            raise json.JSONDecodeError(f"more than {_MAX_SIZE} lists, objects and keys", "", 0)


def _after_space(text: str, at: int) -> int:
    return decoder.WHITESPACE.match(text, at).end()  # type: ignore[attr-defined, no-any-return]


def _plain(run: re.Match[str]) -> list[Any]:
    """The values of a run."""
    try:
        values: list[Any] = json.loads(f"[{run[0][:-1]}]")
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, run.string, run.start() + error.pos - 1) from None
    if not values:  # a comma with nothing before it
        raise json.JSONDecodeError("Expecting value", run.string, run.start())
    return values


def _single(text: str, at: int, scan_once: _ScanOnce) -> tuple[list[Any], int, bool]:
    """One value of a list, where the next begins, and whether there is one."""
    try:
        value, at = scan_once(text, at)
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None
    at = _after_space(text, at)
    if (mark := text[at : at + 1]) not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return [value], _after_space(text, at + 1) if mark == "," else at + 1, mark == ","


def read_large(body: bytes) -> Any:
    """The JSON value that `body` is, read in pieces. Raises json.JSONDecodeError."""
    return _read(lambda body: _Reader().decode(body.decode(json.detect_encoding(body))), body)


def _read(reader: Callable[[bytes], Any], body: bytes) -> Any:
    """What `reader` makes of `body`, with one error for whatever is wrong: json.JSONDecodeError."""
    try:
        return reader(body)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", "", 0) from error
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("not in UTF-8", "", error.start) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError("a number has too many digits", "", 0) from error
