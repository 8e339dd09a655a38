"""Messages come out of the bytes of a stream as they went in, however these are cut; nonsense is refused."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch

from workers import wire
from workers.errors import WireError
from workers.transport.grpc_messages import Messages
from workers.wire import FRAME_BYTES, HEADER_BYTES, Header, Tag

TAG = Tag(1, 2, 3, 4, 5, 6)


class Collected:
    """A `Receiver` that keeps what comes."""

    def __init__(self, takes_whole: bool) -> None:
        self.messages: list[tuple[Header, bytes]] = []
        self.reason = ""
        self._takes_whole = takes_whole
        self._payload = memoryview(b"")

    def whole(self, message: memoryview) -> bool:
        header = wire.parse_head(message)
        if not self._takes_whole or header.payload_bytes != len(message) - HEADER_BYTES:
            return False
        self.messages.append((header, bytes(message[HEADER_BYTES:])))
        return True

    def begin(self, header: Header) -> memoryview:
        self._payload = np.empty(header.payload_bytes, np.uint8).data
        return self._payload

    def end(self, header: Header) -> None:
        self.messages.append((header, bytes(self._payload)))

    def malformed(self, reason: str) -> None:
        self.reason = reason
        raise WireError(reason)


def on_the_wire(frame: wire.Frame) -> bytes:
    content = b"".join(frame)
    return struct.pack(">BI", 0, len(content)) + content


def request(rows: int) -> list[wire.Frame]:
    pairs_P = torch.arange(rows, dtype=torch.int32)
    return list(wire.request_frames(TAG, torch.randn(rows, 512), pairs_P, torch.zeros_like(pairs_P)))


def give(messages: Messages, content: bytes, most: int, seed: int) -> None:
    """Bytes in random pieces of at most `most`; where there is a place for them, sometimes straight there."""
    rng, at = random.Random(seed), 0
    while at < len(content):
        n = rng.randint(1, most)
        place = messages.place()
        if place is not None and len(place) and rng.random() < 0.7:
            n = min(n, len(place))
            place[:n] = content[at : at + n]
            messages.placed(n)
        else:
            messages.take(memoryview(content)[at : at + n])
            n = min(n, len(content) - at)
        at += n


@pytest.mark.parametrize("takes_whole", [True, False])
@pytest.mark.parametrize(
    ("most", "sizes"), [(3, (1, 2)), (90, (1, 3)), (5000, (1, 2000, 3, 500)), (1 << 22, (1, 2000))]
)
def test_messages_of_one_and_of_many_frames_follow_each_other(
    most: int, sizes: tuple[int, ...], takes_whole: bool
) -> None:
    sent = [request(rows) for rows in sizes]
    error = list(wire.error_frames(TAG, ""))
    for seed in range(3):
        collected = Collected(takes_whole)
        messages = Messages(collected)
        give(messages, b"".join(on_the_wire(frame) for frames in (*sent, error) for frame in frames), most, seed)
        assert messages.is_whole
        assert [payload for _, payload in collected.messages] == [
            b"".join(part for frame in frames for part in frame)[HEADER_BYTES:] for frames in (*sent, error)
        ]
        assert [header.n_pairs for header, _ in collected.messages] == [*sizes, 0]
        assert {header.tag for header, _ in collected.messages} == {TAG}


def test_a_message_that_lacks_bytes_is_not_whole() -> None:
    content = b"".join(map(on_the_wire, request(1000)))
    for cut in (1, 5, 6, 70, 77, 78, 5 + FRAME_BYTES, 5 + FRAME_BYTES + 3, len(content) - 1):
        messages = Messages(Collected(True))
        messages.take(memoryview(content)[:cut])
        assert not messages.is_whole, cut


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack(">BI", 1, 100) + bytes(100), id="compressed"),
        pytest.param(struct.pack(">BI", 0, 0), id="empty"),
        pytest.param(struct.pack(">BI", 0, HEADER_BYTES - 1) + bytes(HEADER_BYTES - 1), id="no room for a header"),
        pytest.param(struct.pack(">BI", 0, FRAME_BYTES + 1), id="too long"),
        pytest.param(struct.pack(">BI", 0, 500) + bytes(500), id="no header"),
        pytest.param(on_the_wire((*request(3)[0], b"x")), id="longer than it says"),
        pytest.param(on_the_wire((b"".join(request(3)[0])[:-1],)), id="shorter than it says"),
        pytest.param(on_the_wire(request(2000)[0]) + struct.pack(">BI", 0, 5), id="a short second frame"),
        pytest.param(on_the_wire(request(2000)[0]) + struct.pack(">BI", 0, FRAME_BYTES + 1), id="a long second frame"),
        pytest.param(on_the_wire(request(2000)[0]) + struct.pack(">BI", 0, 0), id="an empty second frame"),
    ],
)
@pytest.mark.parametrize("most", [7, 1 << 22])
def test_what_makes_no_sense_is_refused(content: bytes, most: int) -> None:
    collected = Collected(True)
    with pytest.raises(WireError):
        give(Messages(collected), content, most, 0)
    assert collected.reason
