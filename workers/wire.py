"""Rows and replies as raw little-endian frames on the Exchange stream of `proto/experts.proto`.

A message is a header, then its payload, cut into frames of exactly FRAME_BYTES (the last one is what is left). The
header says how many bytes follow; everything is checked before a byte is allocated for them. Tensors that come out of
a message alias its bytes, and frames alias the tensors that go in.

Legend: T token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.errors import WireError

# Room for a round number of bytes of rows, their header and their pairs.
FRAME_BYTES = (1 << 20) + (1 << 16)
MAX_PAYLOAD_BYTES = 1 << 30
MAX_EXPERTS = 1 << 16

REQUEST, REPLY, ERROR = 1, 2, 3

# What the header of a message is made of, in the characters of `struct`.
_FIELDS = {
    "magic": "4s", "version": "B", "kind": "B", "dtype": "B", "reserved": "x",
    "router": "Q", "epoch": "Q", "step": "Q", "layer": "I", "part": "I", "attempt": "I",
    "n_tokens": "I", "n_pairs": "I", "width": "I", "payload_bytes": "Q", "compute_ns": "Q",
}  # fmt: skip
_HEADER = struct.Struct("<" + "".join(_FIELDS.values()))
HEADER_BYTES = _HEADER.size
MAGIC = b"XMSH"
VERSION = 1


def place(field: str) -> int:
    """Byte of the header that `field` begins at. Kernels that read or write messages take every place from here."""
    before = takewhile(lambda name: name != field, _FIELDS)
    return struct.calcsize("<" + "".join(_FIELDS[name] for name in before))


_N_PAIRS, _AT_N_PAIRS = struct.Struct("<I"), place("n_pairs")
_COMPUTE_NS, _AT_COMPUTE_NS = struct.Struct("<Q"), place("compute_ns")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ITEM_BYTES = (4, 2, 2)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_PAIR_BYTES = 8  # token and expert, int32 each

with warnings.catch_warnings():
    # torch says once per process that it cannot enforce read-only memory. Nothing here writes to what it received.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)
    torch.from_numpy(np.frombuffer(bytes(4), np.int32))


Buffer = bytes | memoryview
Frame = tuple[Buffer, ...]  # in parts, to be joined on the way


class Tag(NamedTuple):
    """Which dispatch a message belongs to. A reply whose tag is not the awaited one is dropped and counted."""

    router: int  # 64 bits, drawn anew at every router start, so that a restarted router is another one
    epoch: int  # placement epoch the rows were routed under
    step: int  # the router's step counter
    layer: int
    part: int  # number of the dispatch within the step
    attempt: int  # 0, then 1 more for every repair of these rows


class Header(NamedTuple):
    """What stands before the payload. The sizes of an ERROR are 0."""

    kind: int
    dtype: torch.dtype
    tag: Tag
    n_tokens: int
    n_pairs: int
    width: int
    payload_bytes: int
    compute_ns: int  # replies: nanoseconds the worker computed


class Request(NamedTuple):
    """The tensors of a REQUEST; they alias the message. The pairs name rows that are there and ascend strictly."""

    x_TD: Tensor
    token_P: Tensor
    expert_P: Tensor


def request_frames(tag: Tag, x_TD: Tensor, token_P: Tensor, expert_P: Tensor) -> Iterator[Frame]:
    """The frames that carry rows to a worker. x_TD: a compute dtype; token_P, expert_P: int32; all in host memory."""
    head, payload_bytes = request_head(tag, x_TD, len(token_P))
    return _cut(head, payload_bytes, raw(x_TD), raw(token_P), raw(expert_P))


def reply_frames(tag: Tag, n_tokens: int, y_PD: Tensor, compute_ns: int) -> Iterator[Frame]:
    """The frames that carry expert rows back. y_PD: a compute dtype, in host memory."""
    return _cut(reply_head(tag, n_tokens, y_PD, compute_ns), y_PD.nbytes, raw(y_PD))


def error_frames(tag: Tag, text: str) -> Iterator[Frame]:
    """The frame that says why rows were not computed; long texts are cut to one frame."""
    frame: Frame = (error_message(tag, text, FRAME_BYTES),)
    return iter((frame,))


def request_head(tag: Tag, x_TD: Tensor, n_pairs: int) -> tuple[bytes, int]:
    """The header of a request, and how many bytes follow it: the rows, token_P, expert_P."""
    n_tokens, width = x_TD.shape
    payload_bytes = x_TD.nbytes + n_pairs * _PAIR_BYTES
    code = _CODES[x_TD.dtype]
    head = _HEADER.pack(MAGIC, VERSION, REQUEST, code, *tag, n_tokens, n_pairs, width, payload_bytes, 0)
    return head, payload_bytes


def put_request_head(
    message: memoryview, tag: Tag, n_tokens: int, n_pairs: int, width: int, dtype: torch.dtype
) -> None:
    """Write the header of a whole request, the rest of which is there already."""
    fields = (*tag, n_tokens, n_pairs, width, len(message) - HEADER_BYTES, 0)
    _HEADER.pack_into(message, 0, MAGIC, VERSION, REQUEST, _CODES[dtype], *fields)


def reply_head(tag: Tag, n_tokens: int, y_PD: Tensor, compute_ns: int) -> bytes:
    """The header of a reply; the bytes of y_PD follow it."""
    n_pairs, width = y_PD.shape
    code = _CODES[y_PD.dtype]
    return _HEADER.pack(MAGIC, VERSION, REPLY, code, *tag, n_tokens, n_pairs, width, y_PD.nbytes, compute_ns)


def first_word(kind: int, dtype: torch.dtype) -> int:
    """The first eight bytes of a message, as a little-endian number."""
    return int.from_bytes(struct.pack("<4sBBBx", MAGIC, VERSION, kind, _CODES[dtype]), "little")


def stamp(reply: memoryview, compute_ns: int) -> int:
    """Write how long a whole REPLY took into its header; returns its number of pairs."""
    _COMPUTE_NS.pack_into(reply, _AT_COMPUTE_NS, compute_ns)
    return pairs_of(reply)


def pairs_of(message: Buffer) -> int:
    """How many pairs a message says that it has; it begins with a whole header."""
    n_pairs: int = _N_PAIRS.unpack_from(message, _AT_N_PAIRS)[0]
    return n_pairs


def error_message(tag: Tag, text: str, limit: int) -> bytes:
    """Why rows were not computed, header and all, cut to `limit` bytes."""
    payload = text.encode()[: limit - HEADER_BYTES]
    return _HEADER.pack(MAGIC, VERSION, ERROR, 0, *tag, 0, 0, 0, len(payload), 0) + payload


def most_tokens(width: int, top_k: int, dtype: torch.dtype) -> int:
    """Token rows [., width] with `top_k` experts each that always fit into a request, and their replies into one."""
    return MAX_PAYLOAD_BYTES // max(top_k * width * dtype.itemsize, width * dtype.itemsize + top_k * _PAIR_BYTES)


def parse_head(first: Buffer) -> Header:
    """The header at the beginning of `first`. Raises WireError unless all its sizes fit together."""
    if len(first) < HEADER_BYTES:
        raise WireError(f"a first frame of {len(first)} bytes; the header alone has {HEADER_BYTES}")
    magic, version, kind, code, *rest = _HEADER.unpack_from(first)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"magic {magic!r}, version {version}; expected {MAGIC!r}, {VERSION}")
    if kind not in (REQUEST, REPLY, ERROR) or code >= len(_DTYPES):
        raise WireError(f"kind {kind} or dtype {code} does not exist")
    tag = Tag._make(rest[:6])
    n_tokens, n_pairs, width, payload_bytes, compute_ns = rest[6:]
    # The reply to a request is bounded before anything is computed for it.
    most = max(payload_bytes, n_pairs * width * _ITEM_BYTES[code])
    if most > MAX_PAYLOAD_BYTES:
        raise WireError(f"{most} bytes announced, or asked for as a reply; the limit is {MAX_PAYLOAD_BYTES}")
    _check_sizes(kind, n_tokens, n_pairs, width, payload_bytes, _ITEM_BYTES[code])
    return Header(kind, _DTYPES[code], tag, n_tokens, n_pairs, width, payload_bytes, compute_ns)


def check_request(header: Header) -> None:
    """Raises WireError for the header of another kind of message."""
    if header.kind != REQUEST:
        raise WireError(f"a message of kind {header.kind} where only requests come")


def reply_ns(head: Buffer, n_bytes: int, tag: Tag, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """The nanoseconds that a worker computed if `head` begins the REPLY to `tag`, of `shape`, `dtype` and `n_bytes`.

    None: it is something else, or makes no sense. One look instead of a Header: this is for what is expected.
    """
    magic, version, kind, code, *rest = _HEADER.unpack_from(head)
    is_it = (
        tuple(rest[:6]) == tag
        and (magic, version, kind, code) == (MAGIC, VERSION, REPLY, _CODES[dtype])
        and (rest[7], rest[8]) == shape
        and rest[9] == n_bytes - HEADER_BYTES == rest[7] * rest[8] * _ITEM_BYTES[code]
        and rest[6]
    )
    compute_ns: int = rest[10]
    return compute_ns if is_it else None


def request(header: Header, content: memoryview) -> Request:
    """The tensors of a request. Raises WireError when the pairs name a row that is not there or do not ascend."""
    check_request(header)
    n_tokens, width = header.n_tokens, header.width
    at = header.payload_bytes - header.n_pairs * _PAIR_BYTES
    x_TD = torch.frombuffer(content, dtype=header.dtype, count=n_tokens * width).view(n_tokens, width)
    return with_rows(header, x_TD, content[at:])


def with_rows(header: Header, x_TD: Tensor, content: memoryview) -> Request:
    """A request whose rows came apart from its pairs, which are `content`. Raises WireError as `request` does."""
    n_pairs = header.n_pairs
    pairs = np.frombuffer(content, np.int32, 2 * n_pairs)
    if not _pairs_fit(pairs.view(np.uint32), header.n_tokens):
        raise WireError("pairs must name a row of the message and ascend by expert, then token, without a repetition")
    return Request(x_TD, torch.from_numpy(pairs[:n_pairs]), torch.from_numpy(pairs[n_pairs:]))


def request_bytes(n_tokens: int, n_pairs: int, width: int, dtype: torch.dtype) -> int:
    """The length of a whole request."""
    return HEADER_BYTES + n_tokens * width * _ITEM_BYTES[_CODES[dtype]] + n_pairs * _PAIR_BYTES


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return _array(tensor).data.cast("B")


def _array(tensor: Tensor) -> NDArray[Any]:
    """A contiguous array of the same bytes; no copy if the tensor is contiguous."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    # numpy has no bfloat16.
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _cut(head: bytes, payload_bytes: int, *parts: memoryview) -> Iterator[Frame]:
    if len(head) + payload_bytes <= FRAME_BYTES:
        whole: Frame = (head, *parts)
        return iter((whole,))
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise WireError(f"a message of {payload_bytes} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    return _frames(memoryview(head), *parts)


def _frames(*parts: memoryview) -> Iterator[Frame]:
    pieces: list[memoryview] = []
    room = FRAME_BYTES
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield tuple(pieces)
                pieces, room = [], FRAME_BYTES
    if pieces:
        yield tuple(pieces)


def _check_sizes(kind: int, n_tokens: int, n_pairs: int, width: int, payload_bytes: int, item_bytes: int) -> None:
    if kind == ERROR:
        fits = n_tokens == n_pairs == width == 0 and payload_bytes <= FRAME_BYTES - HEADER_BYTES
    elif kind == REQUEST:
        fits = payload_bytes == n_tokens * width * item_bytes + n_pairs * _PAIR_BYTES
    else:
        fits = payload_bytes == n_pairs * width * item_bytes
    if not fits or (kind != ERROR and 0 in (n_tokens, n_pairs, width)):
        raise WireError(f"{n_tokens} rows of {width}, {n_pairs} pairs do not make {payload_bytes} bytes")


def _pairs_fit(pairs: NDArray[np.uint32], n_tokens: int) -> bool:
    """Whether the pairs, token_P and then expert_P, name rows that are there and ascend strictly by (expert, token).

    Seen as unsigned, one comparison catches negative numbers too. No pair comes twice, so that a request of T tokens
    never asks for more than T times the model's experts.
    """
    token_P, expert_P = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    if not (token_P.max() < n_tokens and expert_P[-1] < MAX_EXPERTS):
        return False
    key_P = expert_P.astype(np.uint64) << np.uint64(32) | token_P
    return bool((key_P[1:] > key_P[:-1]).all())


def check_frame(n_bytes: int, left: int) -> None:
    """Raises WireError unless `n_bytes` is the length of the next frame of a message that lacks `left` bytes."""
    if n_bytes != min(left, FRAME_BYTES):
        raise WireError(f"a frame of {n_bytes} bytes where {min(left, FRAME_BYTES)} were expected")
