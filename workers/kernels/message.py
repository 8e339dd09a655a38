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
#: Requests of up to so many rows are laid out and answered by kernels: Python would take longer than they do.
FEW_ROWS = 32
