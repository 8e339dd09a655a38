"""A peer that writes anything into its ring can neither crash nor hang the other side, nor make it answer wrongly.

Entries and replies are spoilt 100,000 times, where one thread is enough; what two of them have to wait for each other
for, a thousand times, or as often as EXPERTMESH_MUTATIONS says.
"""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contract.model import Model
from workers import wire
from workers.errors import WireError, WorkerLost
from workers.kernels.message import RING_ENTRIES, RING_ENTRY_BYTES, RING_MESSAGES
from workers.transport.base import Rows
from workers.transport.batcher import Batcher
from workers.transport.shm.ring import InRing, OutRing
from workers.transport.shm.router import Pair, ShmWay
from workers.transport.shm.worker import Lane, ShmAcceptor
from workers.wire import HEADER_BYTES, Tag

MUTATIONS = int(os.environ.get("EXPERTMESH_MUTATIONS", "1000"))
TAG = Tag(1, 2, 3, 1, 4, 0)
PAGE = 4096
SENT, DONE = 64, 128  # of the control page
N_ENTRIES, N_REPLIES = 80_000, 20_000
SIZES = (*map(wire.place, ("layer", "n_tokens", "n_pairs", "width", "payload_bytes")), wire.place("payload_bytes") + 4)
WORDS = (0, 1, 2, 7, 64, 72, 4096, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)

MODEL = Model()
SHARD = MODEL.shard((layer, expert) for layer in range(2) for expert in range(6) if expert != 5)
X_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))


def request(n_tokens: int) -> tuple[bytes, Tensor]:
    """A request that is answered by the kernels, or one that is parsed; and its reply."""
    token_P = torch.arange(n_tokens, dtype=torch.int32).repeat(2)
    expert_P = torch.tensor([1, 3], dtype=torch.int32).repeat_interleave(n_tokens)
    frames = wire.request_frames(TAG, X_TD[:n_tokens], token_P, expert_P)
    return b"".join(next(frames)), SHARD.forward(1, X_TD[:n_tokens], token_P, expert_P)


REQUESTS = [request(n_tokens) for n_tokens in (1, 3, 40)]


def entry_at(number: int) -> int:
    """Where the control page says of a message where it lies."""
    return RING_ENTRIES + number % RING_MESSAGES * RING_ENTRY_BYTES


class HostileRouter:
    """A ring of which every byte is written here, and the lane that reads it."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.ring = OutRing()
        lane = ShmAcceptor(Batcher(SHARD)).accept(self.ring.memory.name, "hostile", self._end)
        assert isinstance(lane, Lane)
        self.lane, self.replies = lane, InRing(lane.text)
        self.ring.memory.forget_file()
        lane.start()

    def ask(self, content: bytes, spoil: Callable[[int], None] = lambda begin: None) -> bytes | None:
        """The reply; None: the lane found that it makes no sense and ended."""
        begin = self.ring.room(len(content))
        assert begin is not None
        self.ring.view(begin, len(content))[:] = content
        spoil(begin)
        self.ring.publish(begin, len(content))
        return self.reply()

    def reply(self) -> bytes | None:
        deadline = time.monotonic() + 20
        while not self.replies.wait():
            if self.ends:
                return None
            assert time.monotonic() < deadline, "the lane hangs"
        reply = bytes(self.replies.next().content)
        self.ring.free(self.replies.received)
        self.ring.done(self.replies.received)
        return reply

    def close(self) -> None:
        self.lane.close()
        del self.lane  # which knows this router: a circle, that would keep descriptors until they are collected

    def _end(self, reason: str) -> None:
        self.ends.append(reason)
        self.replies.rouse()


def assert_right(reply: bytes | None, expected_PD: Tensor) -> None:
    assert reply is not None
    header = wire.parse_head(reply)
    assert header.kind == wire.REPLY and header.tag == TAG
    assert torch.equal(torch.frombuffer(bytearray(reply[HEADER_BYTES:]), dtype=torch.float32), expected_PD.flatten())


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """Some bytes or words of the header or of the pairs are others; or it is longer or shorter than it says."""
    message = bytearray(content)
    header = wire.parse_head(content)
    pairs_at = len(message) - 8 * header.n_pairs
    for _ in range(draw.randint(1, 3)):
        at = draw.choice((draw.randrange(HEADER_BYTES), draw.randrange(pairs_at, len(message))))
        kind = draw.randrange(4)
        if kind == 0:
            message[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            at -= at % 4
            message[at : at + 4] = struct.pack("<I", draw.choice(WORDS) & 0xFFFFFFFF)
        elif kind == 2:
            at = draw.choice(SIZES)
            message[at : at + 4] = struct.pack("<I", draw.choice((*WORDS[:6], draw.randrange(200))) & 0xFFFFFFFF)
        else:
            return bytes(message[: draw.randrange(HEADER_BYTES, len(message))])
    return bytes(message)


def test_requests_that_make_no_sense() -> None:
    draw, router, spoilt_rings = random.Random(7), HostileRouter(), 0
    for _ in range(MUTATIONS // 2):
        content, expected_PD = draw.choice(REQUESTS)
        router.ask(spoilt(content, draw))
        if not router.ends:
            reply = router.ask(content)
            if router.ends:  # it had asked for a second reply at once
                continue
            assert_right(reply, expected_PD)
        else:
            router.close()
            router, spoilt_rings = HostileRouter(), spoilt_rings + 1
    assert_right(router.ask(REQUESTS[0][0]), REQUESTS[0][1])
    assert spoilt_rings > MUTATIONS // 20
    router.close()


def test_entries_that_make_no_sense() -> None:
    """A message lies within the ring whatever the control page says, and a right entry is read rightly after all."""
    draw, out = random.Random(10), OutRing()
    into, page, kept = InRing(out.memory.name), out.memory.map, b"".join((REQUESTS[0][0], bytes(4096)))
    n_refused = 0
    for number in range(N_ENTRIES):
        begin, at, content = out.room(len(kept)), entry_at(number), kept[: draw.randrange(HEADER_BYTES, len(kept))]
        assert begin is not None
        out.view(begin, len(content))[:] = content
        out.publish(begin, len(content))
        entry = page[at : at + RING_ENTRY_BYTES]
        for word in draw.sample((0, 8, 16), draw.randint(1, 3)):
            value = draw.choice((draw.getrandbits(64), draw.getrandbits(32), draw.randrange(4096), draw.choice(WORDS)))
            page[at + word : at + word + 8] = struct.pack("<Q", value)
        assert into.wait()
        try:
            message = into.next()
        except WireError:
            n_refused += 1
            page[at : at + RING_ENTRY_BYTES] = entry
            message = into.next()
            assert bytes(message.content) == content
        else:  # a slice of the ring, whole, at its address
            assert len(message.content) == struct.unpack_from("<Q", page, at + 8)[0]
            assert np.frombuffer(message.content, np.uint8).ctypes.data == message.address
        page[at : at + RING_ENTRY_BYTES] = entry
        out.free(into.received)
    assert N_ENTRIES // 2 < n_refused < N_ENTRIES


def test_control_pages_that_make_no_sense() -> None:
    draw = random.Random(8)
    for _ in range(MUTATIONS // 10):
        router = HostileRouter()
        content, expected_PD = draw.choice(REQUESTS)
        assert_right(router.ask(content), expected_PD)
        page, at = router.ring.memory.map, draw.choice((SENT, DONE, *(entry_at(1) + at for at in (0, 8, 16))))
        begin = router.ring.room(len(content))
        assert begin is not None
        router.ring.view(begin, len(content))[:] = content
        router.ring.publish(begin, len(content))  # the lane may or may not have seen it
        page[at : at + 8] = struct.pack("<Q", draw.choice(WORDS))
        router.lane.close()
    router = HostileRouter()
    assert_right(router.ask(REQUESTS[2][0]), REQUESTS[2][1])
    router.close()


class Flipping:
    """Words of a message that change all the time."""

    def __init__(self, ring: OutRing, places: tuple[int, ...]) -> None:
        self.done = threading.Event()
        self._map, self._places = ring.memory.map, places

    def start(self, begin: int) -> None:
        threading.Thread(target=self._run, args=([begin + place for place in self._places],)).start()

    def _run(self, places: list[int]) -> None:
        kept = [self._map[at : at + 4] for at in places]
        while not self.done.is_set():
            for at, value in zip(places, kept, strict=True):
                self._map[at : at + 4] = b"\xff\xff\xff\x7f"
                self._map[at : at + 4] = value


def test_what_changes_while_it_is_read() -> None:
    """Catches a value that is checked and then read again: it would lead outside of the request."""
    router, (content, expected_PD) = HostileRouter(), REQUESTS[1]
    n_pairs = wire.parse_head(content).n_pairs
    for _ in range(MUTATIONS // 40):
        flipping = Flipping(router.ring, (*SIZES[1:3], len(content) - 8 * n_pairs, len(content) - 4))
        router.ask(content, flipping.start)
        flipping.done.set()
        if router.ends:
            router.close()
            router = HostileRouter()
        else:
            assert_right(router.ask(content), expected_PD)
    router.close()


def hostile_worker() -> tuple[Pair, OutRing, InRing]:
    """A router's pair, and the rings of a worker of which every byte is written here."""
    offered = ShmWay().offer("w")
    assert offered is not None
    requests, replies = InRing(offered.text), OutRing()
    return offered.accepted(replies.memory.name), replies, requests


def test_replies_that_make_no_sense() -> None:
    """One of two replies is spoilt: it is dropped, ends the pair, or is right all the same; the other one is taken."""
    draw, (pair, ring, requests), expected_PD = random.Random(9), hostile_worker(), torch.randn(2, 32)
    reply = b"".join(next(wire.reply_frames(TAG, 1, expected_PD, 7)))
    rows = Rows(TAG, X_TD[:1], torch.zeros(2, dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32))
    n_lost = n_dropped = 0

    for number in range(N_REPLIES):
        assert pair.send(rows) and pair.send(rows)
        message = bytearray(reply)
        message[draw.randrange(HEADER_BYTES)] ^= 1 << draw.randrange(8)
        place, other = (PAGE, len(message)), (2 * PAGE, len(reply))
        ring.view(*place)[:], ring.view(*other)[:] = message, reply
        if number % 20 == 1:
            place = draw.choice(WORDS) & 0x7FFFFFFFFFFFFFFF, draw.choice(WORDS) & 0x7FFFFFFFFFFFFFFF
        ring.publish(*place)
        ring.publish(*other)
        dropped = pair.dropped_replies
        try:
            rows_PD, _ = pair.receive(TAG, 20, torch.empty(2, 32))
            assert torch.equal(rows_PD, expected_PD)
            if pair.dropped_replies == dropped:  # what nobody checks: reserved, tokens asked, nanoseconds
                rows_PD, _ = pair.receive(TAG, 20, torch.empty(2, 32))
                assert torch.equal(rows_PD, expected_PD)
            n_dropped += pair.dropped_replies - dropped
            ring.free(requests.done)
        except WorkerLost:
            n_lost += 1
            pair, ring, requests = hostile_worker()
    assert min(n_lost, n_dropped) > N_REPLIES // 10


@pytest.mark.parametrize("n_replies", [1, 64])
def test_replies_to_nothing(n_replies: int) -> None:
    pair, ring, _ = hostile_worker()
    for _ in range(n_replies):
        begin = ring.room(HEADER_BYTES)
        assert begin is not None
        ring.publish(begin, HEADER_BYTES)
    with pytest.raises(WorkerLost, match="malformed"):
        pair.receive(TAG, 20, torch.empty(1, 32))
