"""What the kernels know of a message of `workers.wire`, and of a ring of them."""

from __future__ import annotations

from workers import wire

#: Of its header, and where its fields are in it. Kernels take numbers, not the fields of a numpy type.
HEADER_BYTES = wire.HEADER_BYTES
LAYER, N_TOKENS, N_PAIRS, WIDTH = map(wire.place, ("layer", "n_tokens", "n_pairs", "width"))
PAYLOAD_BYTES, COMPUTE_NS = map(wire.place, ("payload_bytes", "compute_ns"))
#: In the control page of a ring in shared memory (`transport.shm.ring`): its last messages, how many and how long.
RING_ENTRIES, RING_MESSAGES, RING_ENTRY_BYTES = 1024, 64, 32
#: And how many messages were sent, and how many of the peer's this side is done with; then, where messages lie.
RING_SENT, RING_DONE, RING_DATA, RING_ALIGN = 64, 128, 4096, 64
#: Requests of up to so many rows are laid out and answered by kernels: Python would take longer than they do.
FEW_ROWS = 32
