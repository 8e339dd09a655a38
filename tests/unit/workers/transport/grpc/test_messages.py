"""Messages come out of the bytes of a stream as they went in, however those are cut; nonsense is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from workers import wire
from workers.transport.grpc.messages import Messages
from workers.wire import FRAME_BYTES, HEADER_BYTES, Header, Tag

TAG = Tag(1, 2, 3, 4, 5, 6)


class Receiver:
    def __init__(self) -> None:
        self.complete: list[tuple[Header, memoryview]] = []
        self.reason: str | None = None

    def whole(self, message: memoryview) -> bool:
        self.complete.append((wire.parse_head(message), message[HEADER_BYTES:]))
        return True

    def begin(self, header: Header) -> memoryview:
        self._payload = np.empty(header.payload_bytes, np.uint8).data
        return self._payload

    def end(self, header: Header) -> None:
        self.complete.append((header, self._payload))

    def malformed(self, reason: str) -> None:
        assert self.reason is None, "more bytes were looked at"
        self.reason = reason


def frames(rows: int) -> list[bytes]:
    pairs_P = torch.arange(rows, dtype=torch.int32)
    request = wire.request_frames(TAG, torch.randn(rows, 512), pairs_P, torch.zeros_like(pairs_P))
    return [b"".join(frame) for frame in request]


def prefixed(frame: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(frame)) + frame


def take(pieces: Iterable[bytes]) -> tuple[Messages, Receiver]:
    receiver = Receiver()
    messages = Messages(receiver)
    for piece in pieces:
        messages.take(memoryview(piece))
    return messages, receiver


def in_place(data: bytes) -> tuple[Messages, Receiver]:
    """As a connection does it that reads large payloads straight to their place."""
    receiver = Receiver()
    messages = Messages(receiver)
    while data:
        place = messages.place()
        n = min(len(place) or 7, len(data))
        if place:
            place[:n] = data[:n]
            messages.placed(n)
        else:
            messages.take(memoryview(data)[:n])
        data = data[n:]
    return messages, receiver


def pieces_of(n: int) -> Callable[[bytes], tuple[Messages, Receiver]]:
    return lambda data: take(data[at : at + n] for at in range(0, len(data), n))


@pytest.mark.parametrize("read", [pieces_of(1009), pieces_of(1 << 14), pieces_of(1 << 30), in_place])
def test_requests_of_one_and_of_many_frames_follow_each_other(
    read: Callable[[bytes], tuple[Messages, Receiver]],
) -> None:
    """Catches bytes that get lost or change their order where a piece ends."""
    sent = [frames(rows) for rows in (1, 2000, 3, 500, 1)]
    messages, receiver = read(b"".join(prefixed(frame) for request in sent for frame in request))
    assert receiver.reason is None
    assert messages.is_whole
    assert len(receiver.complete) == len(sent)
    for (header, payload), request in zip(receiver.complete, sent, strict=True):
        again = wire.request_frames(TAG, *wire.request(header, payload))
        assert [b"".join(frame) for frame in again] == request


def test_bytes_one_by_one() -> None:
    """Catches a prefix or header that is only understood in one piece."""
    data = b"".join(map(prefixed, frames(1) + frames(2)))
    messages, receiver = take(data[at : at + 1] for at in range(len(data)))
    assert [header.n_pairs for header, _ in receiver.complete] == [1, 2]
    assert messages.is_whole


def test_a_whole_message_is_only_taken_between_two_others() -> None:
    """Catches the second frame of a message that is mistaken for a message of its own."""
    first, second = frames(600)
    messages, receiver = take([prefixed(first)])
    assert not messages.is_whole
    assert not messages.whole(memoryview(second))
    messages.take(memoryview(prefixed(second)))
    assert messages.is_whole
    assert messages.whole(memoryview(frames(1)[0]))
    assert [header.n_pairs for header, _ in receiver.complete] == [600, 1]


def test_a_message_that_lacks_bytes_is_not_whole() -> None:
    """Catches a half-closed stream that is taken for a complete one."""
    data = b"".join(map(prefixed, frames(1000)))
    for cut in (1, 5, 6, 70, 77, 78, 5 + FRAME_BYTES, 5 + FRAME_BYTES + 3, len(data) - 1):
        messages, _ = take([data[:cut]])
        assert not messages.is_whole, cut


@pytest.mark.parametrize("second", [b"", b"short", bytes(FRAME_BYTES + 1)])
def test_a_frame_of_another_length_is_refused(second: bytes) -> None:
    _, receiver = take([prefixed(frames(2000)[0]), prefixed(second), os.urandom(100)])
    assert receiver.reason is not None
    assert "frame" in receiver.reason


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(prefixed(b""), id="empty"),
        pytest.param(prefixed(frames(1)[0][:-1]), id="cut off"),
        pytest.param(prefixed(frames(1)[0] + b"\0"), id="too long"),
        pytest.param(struct.pack(">BI", 0, FRAME_BYTES + 1), id="longer than a frame"),
        pytest.param(prefixed(frames(1)[0], compressed=1), id="compressed"),
        pytest.param(prefixed(os.urandom(500)), id="noise"),
        pytest.param(struct.pack(">BI", 0, HEADER_BYTES - 1) + bytes(HEADER_BYTES - 1), id="no room for a header"),
        pytest.param(prefixed(frames(2000)[0]) + struct.pack(">BI", 0, 5), id="a short second frame"),
        pytest.param(prefixed(frames(2000)[0]) + struct.pack(">BI", 0, FRAME_BYTES + 1), id="a long second frame"),
        pytest.param(prefixed(frames(2000)[0]) + struct.pack(">BI", 0, 0), id="an empty second frame"),
    ],
)
@pytest.mark.parametrize("most", [7, 1 << 22])
def test_what_makes_no_sense_is_refused_once(data: bytes, most: int) -> None:
    """Catches nonsense that gets through, and bytes behind it that are believed."""
    data += prefixed(frames(1)[0])
    messages, receiver = take(data[at : at + most] for at in range(0, len(data), most))
    assert receiver.reason is not None
    assert not receiver.complete
    assert not messages.whole(memoryview(frames(1)[0]))
