"""The wire format: what goes in comes out, and no bytes get past the checks or cost memory they lack."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import wire
from workers.errors import WireError
from workers.wire import FRAME_BYTES, HEADER_BYTES, Tag

TAG = Tag(router=2**64 - 1, epoch=3, step=2**40, layer=5, part=6, attempt=1)
ONE_P = torch.zeros(1, dtype=torch.int32)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TAGS = st.builds(Tag, U64, U64, U64, U32, U32, U32)


def decoded(message: bytes) -> tuple[wire.Header, wire.Request]:
    header = wire.parse_head(message)
    wire.check_frame(min(len(message), FRAME_BYTES), HEADER_BYTES + header.payload_bytes)
    return header, wire.request(header, memoryview(message)[HEADER_BYTES:])


def joined(frames: Iterator[wire.Frame]) -> bytes:
    return b"".join(part for frame in frames for part in frame)


@given(TAGS, DTYPES, st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_request_comes_out_as_it_went_in(tag: Tag, dtype: torch.dtype, t: int, d: int, data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, wire.MAX_EXPERTS - 1), st.integers(0, t - 1))
    pairs = torch.tensor(sorted(data.draw(st.sets(pair, min_size=1, max_size=20))), dtype=torch.int32)
    x_TD = torch.randn(t, d).to(dtype)
    expert_P, token_P = pairs.T.contiguous()
    header, request = decoded(joined(wire.request_frames(tag, x_TD, token_P, expert_P)))
    assert (header.tag, header.kind, header.dtype) == (tag, wire.REQUEST, dtype)
    for sent, received in zip((x_TD, token_P, expert_P), request, strict=True):
        assert torch.equal(sent, received)


@pytest.mark.parametrize("extra", [-8, 0, 4, FRAME_BYTES, 3 * FRAME_BYTES + 8])
def test_messages_around_the_size_of_a_frame(extra: int) -> None:
    n_bytes = FRAME_BYTES - HEADER_BYTES - 8 + extra  # one pair takes 8
    x_TD = torch.randn(1, n_bytes // 4)
    one_P = torch.zeros(1, dtype=torch.int32)
    frames = list(wire.request_frames(TAG, x_TD, one_P, one_P))
    sizes = [sum(map(len, frame)) for frame in frames]
    assert sizes[:-1] == [FRAME_BYTES] * (len(frames) - 1)
    assert sum(sizes) == HEADER_BYTES + x_TD.nbytes + 8
    assert torch.equal(decoded(joined(iter(frames)))[1].x_TD, x_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3000])
def test_a_reply_has_the_rows_behind_its_header(rows: int, dtype: torch.dtype) -> None:
    y_PD = torch.randn(rows, 512).to(dtype)
    message = joined(wire.reply_frames(TAG, rows, y_PD, compute_ns=123))
    header = wire.parse_head(message)
    out_PD = torch.empty_like(y_PD)
    wire.raw(out_PD)[:] = message[HEADER_BYTES:]
    assert torch.equal(out_PD, y_PD)
    assert (header.n_pairs, header.width, header.compute_ns) == (rows, 512, 123)


def test_the_awaited_reply_is_known_at_one_look() -> None:
    """Catches a reply to something else, or of another size, that is taken for the awaited one."""
    y_PD = torch.randn(3, 8)
    message = joined(wire.reply_frames(TAG, 2, y_PD, compute_ns=0))
    assert wire.reply_ns(message, len(message), TAG, y_PD.shape, y_PD.dtype) == 0
    others = [
        (message, TAG._replace(attempt=2), y_PD.shape, y_PD.dtype),
        (message, TAG, (3, 4), y_PD.dtype),
        (message, TAG, (6, 8), torch.bfloat16),
        (message + b"\0", TAG, y_PD.shape, y_PD.dtype),
        (message[:-1], TAG, y_PD.shape, y_PD.dtype),
        (b"Y" + message[1:], TAG, y_PD.shape, y_PD.dtype),
        (joined(wire.error_frames(TAG, "no")), TAG, (0, 0), torch.float32),
        (joined(wire.request_frames(TAG, torch.ones(3, 8), ONE_P, ONE_P)), TAG, y_PD.shape, y_PD.dtype),
    ]
    for other, tag, shape, dtype in others:
        assert wire.reply_ns(other, len(other), tag, shape, dtype) is None


def test_rows_that_are_not_contiguous() -> None:
    x_TD = torch.randn(8, 6).T[::2]
    one_P = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(decoded(joined(wire.request_frames(TAG, x_TD, one_P, one_P)))[1].x_TD, x_TD)


def test_an_error_is_one_frame_however_long() -> None:
    frames = list(wire.error_frames(TAG, "é" * FRAME_BYTES))
    assert len(frames) == 1
    assert sum(map(len, frames[0])) == FRAME_BYTES
    header = wire.parse_head(frames[0][0])
    assert header.kind == wire.ERROR
    assert header.tag == TAG


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_head(frame)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_request_is_refused_or_still_well_formed(data: st.DataObject) -> None:
    x_TD = torch.ones(3, 2)
    token_P, expert_P = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    frame = bytearray(joined(wire.request_frames(TAG, x_TD, token_P, expert_P)))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))]) if data.draw(st.booleans()) else bytes(frame)
    try:
        header, request = decoded(cut)
    except WireError:
        return
    assert request.token_P.min() >= 0
    assert request.token_P.max() < header.n_tokens
    assert request.expert_P.min() >= 0
    key_P = request.expert_P.long() * 2**32 + request.token_P
    assert (key_P.diff() > 0).all()


@pytest.mark.parametrize(("tokens", "experts"), [([0, 0], [1, 1]), ([1, 0], [1, 1]), ([0, 1], [2, 1])])
def test_no_pair_comes_twice_or_out_of_order(tokens: list[int], experts: list[int]) -> None:
    """Would catch a request that asks for more rows than its tokens times the model's experts."""
    token_P, expert_P = torch.tensor(tokens, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32)
    with pytest.raises(WireError, match="repetition"):
        decoded(joined(wire.request_frames(TAG, torch.ones(2, 8), token_P, expert_P)))


def test_a_reply_that_would_be_too_large_is_refused_before_it_is_computed() -> None:
    """17,000 pairs on 4 rows of 64 KiB, in a request of 400 KiB, ask for a reply of 1.1 GB."""
    pairs_P = torch.arange(17000, dtype=torch.int32)
    head, _ = wire.request_head(TAG, torch.empty(4, 1 << 14), len(pairs_P))
    with pytest.raises(WireError, match="reply"):
        wire.parse_head(head)


@given(st.integers(1, 1 << 15), st.integers(1, 8), DTYPES)
def test_the_most_tokens_of_a_step_fit_and_one_more_may_not(width: int, top_k: int, dtype: torch.dtype) -> None:
    most = wire.most_tokens(width, top_k, dtype)
    largest = [
        max(rows * top_k * width * dtype.itemsize, rows * (width * dtype.itemsize + 8 * top_k))
        for rows in (most, most + 1)
    ]
    assert largest[0] <= wire.MAX_PAYLOAD_BYTES < largest[1]


def test_an_announced_size_is_not_allocated_before_it_is_checked() -> None:
    frame = bytearray(joined(wire.reply_frames(TAG, 1, torch.zeros(1, 2), 0)))
    struct.pack_into("<Q", frame, HEADER_BYTES - 16, 2**63)
    with pytest.raises(WireError, match="limit"):
        wire.parse_head(bytes(frame))
