"""What the kernels know of a message of `workers.wire`, and of a ring of them."""

from __future__ import annotations

import struct

from workers import wire

#: Of its header.
HEADER_BYTES = wire.HEADER_BYTES
#: Where the header says how many pairs there are.
N_PAIRS = struct.Struct("<48xI")
#: In the control page of a ring in shared memory (`transport.shm.ring`): its last messages, how many and how long.
RING_ENTRIES, RING_MESSAGES, RING_ENTRY_BYTES = 1024, 64, 32
#: And how many messages were sent, and how many of the peer's this side is done with; then, where messages lie.
RING_SENT, RING_DONE, RING_DATA, RING_ALIGN = 64, 128, 4096, 64
#: Requests of up to so many rows are laid out and answered by kernels: Python would take longer than they do.
FEW_ROWS = 32
