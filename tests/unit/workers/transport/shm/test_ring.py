"""Catches room that is given twice or never comes back, and memory that a peer could change, shrink or keep alive."""

from __future__ import annotations

import fcntl
import os
import random
from pathlib import Path

import pytest

from workers.errors import WireError
from workers.kernels.message import RING_DATA
from workers.transport.shm.memory import NotShared, OwnMemory, PeerMemory
from workers.transport.shm.ring import RING_BYTES, InRing, OutRing


def send(ring: OutRing, content: bytes) -> int:
    begin = ring.room(len(content))
    assert begin is not None
    ring.view(begin, len(content))[:] = content
    ring.publish(begin, len(content))
    return begin


def test_messages_arrive_whole_and_in_order_while_their_room_is_used_again() -> None:
    out, draw = OutRing(), random.Random(1)
    into, waiting, received = InRing(out.memory.name), [], 0
    for number in range(2000):
        content = bytes([number % 251]) * draw.choice((72, 100, 5000, 70_000))
        send(out, content)
        waiting.append(content)
        if len(waiting) > draw.randrange(8):
            for expected in waiting[: draw.randrange(len(waiting) + 1)]:
                assert into.wait()
                assert bytes(into.next().content) == expected
                received += 1
            out.free(received)
            del waiting[: received - (number + 1 - len(waiting))]


def test_memory_is_used_from_the_beginning_whenever_that_is_free() -> None:
    ring = OutRing()
    first = send(ring, bytes(1000))
    second = send(ring, bytes(1000))
    assert second > first
    ring.free(1)
    assert send(ring, bytes(500)) == first, "what is free again at the beginning is passed over"
    assert ring.room(1000) not in (first, second)
    ring.free(3)
    assert send(ring, bytes(1000)) == first


def test_the_room_behind_a_message_that_kernels_wrote_is_as_good_as_any() -> None:
    """The peer refuses a message that begins where none may: a void step would cost all its workers."""
    ring = OutRing()
    into = InRing(ring.memory.name)
    for n_bytes in (72, 1656, 4096):
        ring.publish(RING_DATA, n_bytes)
        assert into.wait() and len(into.next().content) == n_bytes
        send(ring, b"x" * 100)
        assert into.wait() and bytes(into.next().content) == b"x" * 100
        ring.free(into.received)


def test_a_ring_is_full_once() -> None:
    ring = OutRing()
    assert ring.room(RING_BYTES) is None
    for _ in range(64):
        send(ring, bytes(72))
    assert ring.room(72) is None
    ring.free(1)
    assert ring.room(72) is not None
    with pytest.raises(WireError):
        ring.free(80)


def test_waiting_ends_without_a_message() -> None:
    ring = OutRing()
    assert not InRing(ring.memory.name).wait()


def test_only_its_maker_writes_to_it_and_nobody_shrinks_it() -> None:
    memory = OwnMemory(1 << 20)
    path = f"/proc/{os.getpid()}/fd/{memory.name.split()[1]}"
    peer = PeerMemory(memory.name, 1 << 20)
    memory.map[100:104] = b"rows"
    assert peer.map[100:104] == b"rows"
    with pytest.raises(TypeError):
        peer.map[100:104] = b"none"
    with open(path, "r+b", buffering=0) as file, pytest.raises(OSError, match="not permitted"):
        os.ftruncate(file.fileno(), 0)
    with open(path, "r+b", buffering=0) as file, pytest.raises(OSError, match="not permitted"):
        file.write(b"x")


def named_memory() -> list[str]:
    """What this process has mapped from /dev/shm, where other processes may come and go meanwhile."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]


def test_it_has_no_name_and_no_descriptor_once_the_peer_has_it() -> None:
    named, open_before = named_memory(), len(os.listdir("/proc/self/fd"))
    memory = OwnMemory(1 << 20)
    peer = PeerMemory(memory.name, 1 << 20)
    memory.forget_file()
    assert named_memory() == named
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2  # Python's mappings keep one each
    with pytest.raises(NotShared):
        PeerMemory(memory.name, 1 << 20)
    assert peer.map[:16].hex() == memory.name.split()[2]


@pytest.mark.parametrize("what", ["", "1", "x y z", "1 2 3 4", "0 0 00", "999999999 3 00"])
def test_names_that_mean_nothing_are_refused(what: str) -> None:
    with pytest.raises(NotShared):
        PeerMemory(what, 4096)


def test_only_rings_are_opened(tmp_path: Path) -> None:
    memory = OwnMemory(1 << 16)
    pid, number, nonce = memory.name.split()
    with pytest.raises(NotShared, match="bytes"):
        PeerMemory(memory.name, 1 << 20)
    with pytest.raises(NotShared, match="another"):
        PeerMemory(f"{pid} {number} {nonce[::-1]}", 1 << 16)
    with (tmp_path / "secret").open("w") as file, pytest.raises(NotShared, match="no ring"):
        PeerMemory(f"{pid} {file.fileno()} {nonce}", 0)
    unsealed = os.memfd_create("expertmesh-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(NotShared, match="sealed"):
        PeerMemory(f"{pid} {unsealed} {nonce}", 4096)
    assert fcntl.fcntl(unsealed, 1034) == 0
    os.close(unsealed)
