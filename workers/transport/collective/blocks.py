"""How requests and replies lie in the messages of a mesh, and the memory for them.

As on the Exchange stream, but in one piece or in three.

A message of at most BLOCK_BYTES is one block: the header of `workers.wire`, then what it announces. Of a larger one
the block holds the header alone, and the tensors follow as they lie in memory: copying them would cost more than two
messages.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from workers import wire
from workers.wire import HEADER_BYTES

BLOCK_BYTES = (1 << 20) + (1 << 16)  # a round number of bytes of rows, and their pairs
ERROR_BYTES = 1 << 10  # room that every reply has for the text of an error
LEAVE = b"LEAV"  # the control word of a router that leaves the group, in a block of its own; the worker echoes it
_SMALLEST, _LARGEST_KEPT, _KEPT = 1 << 10, 1 << 24, 4


def fits(payload_bytes: int) -> bool:
    """Whether a message with this payload is one block."""
    return HEADER_BYTES + payload_bytes <= BLOCK_BYTES


def view(block: Tensor) -> memoryview:
    """The bytes of a block."""
    return block.numpy().data


def fill(block: Tensor, head: wire.Buffer, *tensors: Tensor) -> Tensor:
    """Write a message into `block`; returns the part that it takes."""
    target = view(block)
    target[: len(head)] = head
    at = len(head)
    for tensor in tensors:
        raw = wire.raw(tensor)
        target[at : at + len(raw)] = raw
        at += len(raw)
    return block[:at]


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as uint8 [n], over the same memory."""
    return tensor.contiguous().view(-1).view(torch.uint8)


class Buffers:
    """Not thread-safe. A block that is not given back is freed when nobody refers to it any more."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, n_bytes: int) -> Tensor:
        """A uint8 block of at least `n_bytes`: the next power of two."""
        size = max(_SMALLEST, 1 << (n_bytes - 1).bit_length())
        free = self._free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give(self, block: Tensor) -> None:
        """Keep `block`, which `take` gave, for the next taker; a few of a size, and none that is very large."""
        free = self._free[len(block)]
        if len(free) < _KEPT and len(block) <= _LARGEST_KEPT:
            free.append(block)
