"""What the kernels know of a message of `workers.wire`."""

from __future__ import annotations

import struct

from workers import wire

#: Of its header.
HEADER_BYTES = wire.HEADER_BYTES
#: Where the header says how many pairs there are.
N_PAIRS = struct.Struct("<48xI")
#: Requests of up to so many rows are laid out and answered by kernels: Python would take longer than they do.
FEW_ROWS = 32
