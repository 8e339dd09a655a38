"""A streamed HTTP POST on bare asyncio: the load generator shares the cores with what it measures.

An event of 64 concurrent streams costs a quarter of the CPU time that it costs with httpx, JSON included.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ExpertMeshError

_LIMIT = 4 * 1024 * 1024  # longest line


class HTTPError(ExpertMeshError):
    """A response that is not 200. `code` is the error envelope's, or the status."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        try:
            self.code = str(json.loads(body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            self.code = f"HTTP {status}"


class StreamError(ExpertMeshError):
    """An error that the server found after it had begun to stream. `code` is the error envelope's."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"error in the stream: {error.get('message')}")
        self.code = str(error.get("code"))


async def post_events(url: str, headers: dict[str, str], body: bytes) -> AsyncGenerator[dict[str, Any], None]:
    """The events of the server's answer up to `[DONE]`, each as soon as it is here.

    Raises HTTPError, StreamError; OSError and asyncio.IncompleteReadError when the connection breaks.
    """
    parts = urlsplit(url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls, limit=_LIMIT)
    try:
        fields = {"Host": parts.netloc, "Connection": "close", "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        status, chunked = await _read_head(reader)
        data = _chunks(reader) if chunked else _rest(reader)
        if status != 200:
            raise HTTPError(status, b"".join([part async for part in data]))
        pending = b""
        async for part in data:
            *events, pending = (pending + part).split(b"\n\n")
            for event in events:
                payload = event.removeprefix(b"data: ")
                if payload == b"[DONE]":
                    return
                if payload is event:
                    continue
                value = json.loads(payload)
                if "error" in value:
                    raise StreamError(value["error"])
                yield value
        raise asyncio.IncompleteReadError(pending, None)
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    return int(head.split(" ", 2)[1]), "\r\ntransfer-encoding: chunked\r\n" in head


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    """The body of a chunked response. One read for whatever is there, because every await costs."""
    buffer = b""
    while True:
        if (end := buffer.find(b"\r\n")) >= 0:
            start, size = end + 2, int(buffer[:end].split(b";")[0], 16)
            if size == 0:
                return
            if len(buffer) >= start + size + 2:
                yield buffer[start : start + size]
                buffer = buffer[start + size + 2 :]
                continue
        if not (data := await reader.read(65536)):
            raise asyncio.IncompleteReadError(buffer, None)
        buffer += data


async def _rest(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while data := await reader.read(65536):
        yield data
