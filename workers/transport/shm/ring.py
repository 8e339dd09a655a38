"""A ring: messages of `wire`, each in one piece, from the process that owns the memory to the one that reads it.

The memory begins with a control page that its owner writes: how many messages it has sent, where the last of them lie,
and how many of the peer's it is done with. Each side has one ring, so each learns from the other's page when the room
of its own messages is free again.

Room is the first gap that is wide enough between the messages that may still be read; the page tells where they lie. As
long as little is in flight it is the same few pages, which are in the caches, and memory is used only as far as the
most that ever was in flight.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from workers import wire
from workers.errors import WireError
from workers.kernels.cpu import kernel
from workers.kernels.cpu.arguments import RingPublish, RingRoom, RingSleep
from workers.kernels.cpu.kernel import HEAD
from workers.kernels.cpu.system import system
from workers.kernels.message import (
    RING_ALIGN,
    RING_DATA,
    RING_DONE,
    RING_ENTRIES,
    RING_ENTRY_BYTES,
    RING_MESSAGES,
    RING_SENT,
)
from workers.transport.shm.memory import OwnMemory, PeerMemory

RING_BYTES = RING_DATA + wire.MAX_PAYLOAD_BYTES + (1 << 16)  # of addresses; for memory see above
_ENTRY = struct.Struct("<QQQ")  # offset, bytes, how many workers were asked at once
_COUNT = struct.Struct("<I")
COUNTS = 1 << 32
_BEGIN, _BYTES, _ASKED = (HEAD + RingPublish._fields.index(name) for name in ("begin", "n_bytes", "asked"))
_FREED, _WANTED = (HEAD + RingRoom._fields.index(name) for name in ("freed", "n_bytes"))
_KNOWN = HEAD + RingSleep._fields.index("known")


def signed(count: int) -> int:
    """A count as a kernel sees it."""
    return (count + COUNTS // 2) % COUNTS - COUNTS // 2


class Message(NamedTuple):
    """A message in the peer's ring. It is there; what it says is still to be checked, and the peer may change it."""

    content: memoryview  # header and all
    address: int
    asked: int  # how many workers were asked at once, this one included


class OutRing:
    """The ring that this side writes. One thread uses it."""

    def __init__(self) -> None:
        """Raises NotShared."""
        self.memory = memory = OwnMemory(RING_BYTES)
        self._view = memoryview(memory.map)
        #: Messages that nobody reads any more, modulo 2**32.
        self.freed = 0
        self._publish = kernel.ring_publish.arguments(1, RingPublish(memory.address, 0, 0, 0, system()))
        self._find_room = kernel.ring_room.arguments(1, RingRoom(memory.address, 0, 0, RING_BYTES))

    def room(self, n_bytes: int) -> int | None:
        """Where a message may lie, as an offset; None: too much is in flight."""
        self._find_room[_FREED], self._find_room[_WANTED] = signed(self.freed), n_bytes
        kernel.ring_room.run(1, self._find_room)
        return self._find_room[0] or None

    def view(self, begin: int, n_bytes: int) -> memoryview:
        """The memory of a message."""
        return self._view[begin : begin + n_bytes]

    def address(self, begin: int) -> int:
        """Of a message."""
        return self.memory.address + begin

    def publish(self, begin: int, n_bytes: int, asked: int = 1) -> None:
        """A message that has been written where there was `room` is there for the peer from now on."""
        self._publish[_BEGIN], self._publish[_BYTES], self._publish[_ASKED] = begin, n_bytes, asked
        kernel.ring_publish.run(1, self._publish)

    def free(self, n: int) -> None:
        """The peer is done with `n` messages, counted modulo 2**32. Raises WireError for more than there are."""
        done = (n - self.freed) % COUNTS
        if done > self.n_taken:
            raise WireError(f"the peer is done with {done} messages of {self.n_taken}")
        self.freed = n

    @property
    def n_taken(self) -> int:
        """Messages that may still be read."""
        sent: int = _COUNT.unpack_from(self._view, RING_SENT)[0]
        return (sent - self.freed) % COUNTS

    def done(self, n: int) -> None:
        """Let the peer know that this side is done with `n` of its messages."""
        _COUNT.pack_into(self._view, RING_DONE, n % COUNTS)


class InRing:
    """The ring that the peer writes. One thread uses it."""

    def __init__(self, name: str) -> None:
        """`name` of the peer's memory. Raises NotShared."""
        memory = PeerMemory(name, RING_BYTES)
        self._view, self.address = memoryview(memory.map), memory.address
        self.received = 0
        values = RingSleep(memory.address + RING_SENT, 0, system())
        self._sleep = kernel.ring_sleep.arguments(1, values)
        self._rouse = kernel.ring_rouse.arguments(1, values)

    def wait(self) -> bool:
        """Whether there is a message; sleeps for one at most 50 ms."""
        self._sleep[_KNOWN] = known = signed(self.received)
        kernel.ring_sleep.run(1, self._sleep)
        return self._sleep[0] != known

    def next(self) -> Message:
        """The oldest message that was not received yet; there is one. Raises WireError if it lies nowhere."""
        n_waiting = (self._sleep[0] - self.received) % COUNTS
        at = RING_ENTRIES + self.received % RING_MESSAGES * RING_ENTRY_BYTES
        begin, n_bytes, asked = _ENTRY.unpack_from(self._view, at)
        is_there = RING_DATA <= begin <= RING_BYTES and wire.HEADER_BYTES <= n_bytes <= RING_BYTES - begin
        if not is_there or begin % RING_ALIGN or not 0 < asked < 1 << 16 or n_waiting > RING_MESSAGES:
            raise WireError(
                f"{n_waiting} messages, the first of {n_bytes} bytes at {begin}: the ring does not hold that"
            )
        self.received += 1
        return Message(self._view[begin : begin + n_bytes], self.address + begin, asked)

    @property
    def done(self) -> int:
        """How many messages the peer is done with, by its own word."""
        n: int = _COUNT.unpack_from(self._view, RING_DONE)[0]
        return n

    def rouse(self) -> None:
        """Wake the thread that waits, from another one: there is something else to look at."""
        kernel.ring_rouse.run(1, self._rouse)
