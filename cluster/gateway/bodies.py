"""Bodies of requests: read whole, within a size and a time, and unpacked."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

import zstandard
from starlette.types import Receive

from cluster.errors import RequestError

_TIMEOUT_S = 30.0  # for all of it, however slowly it comes
_MOST_MEMBERS = 64  # of a gzip body; each costs a copy of what follows it
_ZLIB_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
    """The whole body, at most `limit` bytes before and after it is unpacked; None where the client left meanwhile.

    Raises RequestError: 413 too large, 408 too slow, 415 packed in another way than gzip, deflate or zstd, 400 packed
    wrongly.
    """
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            body = await _receive(receive, limit)
    except TimeoutError as error:
        message = f"The body did not come within {_TIMEOUT_S:g} s"
        raise RequestError(message, code="request_timeout", status=408) from error
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if body is None or coding in (b"identity", b""):
        return body
    return await asyncio.to_thread(_unpacked, body, coding, limit)


async def _receive(receive: Receive, limit: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def _unpacked(body: bytes, coding: bytes, limit: int) -> bytes:
    try:
        if coding == b"zstd":
            with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
                content = reader.read(limit + 1)
        elif coding in _ZLIB_WINDOWS:
            content = _inflated(body, _ZLIB_WINDOWS[coding], limit + 1)
        else:
            message = "Content-Encoding must be gzip, deflate or zstd"
            raise RequestError(message, code="unsupported_encoding", status=415)
    except (zlib.error, zstandard.ZstdError) as error:
        message = f"The body is not {coding.decode('ascii', 'replace')}"
        raise RequestError(message, code="invalid_encoding") from error
    if len(content) > limit:
        raise _too_large(limit)
    return content


def _inflated(body: bytes, window: int, most: int) -> bytes:
    """The first `most` bytes of what is packed in one member or, with gzip, several. Raises zlib.error."""
    content = b""
    for _ in range(_MOST_MEMBERS):
        member = zlib.decompressobj(window)
        content += member.decompress(body, most - len(content))
        body = member.unused_data
        if len(content) == most or (member.eof and not body):
            return content
        if not member.eof:
            raise zlib.error("it ends early")
    raise zlib.error("it has too many members")


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The body is larger than {limit} bytes", code="request_too_large", status=413)
