"""Bodies of requests: read whole, within a size and a time, and unpacked."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

import zstandard
from starlette.types import Receive

from cluster.errors import RequestError

_TIMEOUT_S = 30.0  # for all of it, however slowly it comes
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
    return _unpacked(body, coding, limit)


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
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                content = reader.read(limit + 1)
        elif coding in _ZLIB_WINDOWS:
            content = zlib.decompressobj(_ZLIB_WINDOWS[coding]).decompress(body, limit + 1)
        else:
            message = "Content-Encoding must be gzip, deflate or zstd"
            raise RequestError(message, code="unsupported_encoding", status=415)
    except (zlib.error, zstandard.ZstdError) as error:
        message = f"The body is not {coding.decode('ascii', 'replace')}"
        raise RequestError(message, code="invalid_encoding") from error
    if len(content) > limit:
        raise _too_large(limit)
    return content


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The body is larger than {limit} bytes", code="request_too_large", status=413)
