"""Requests of few rows, answered by two kernel calls: what a decoding step asks of an expert worker.

A worker that computed has little of its Python left in the caches, and what is microseconds of code takes as long as
reading an expert then. So one kernel reads and checks the request, another computes into the reply.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from workers.kernels import native
from workers.kernels.experts import LayerExperts
from workers.kernels.native import FEW_ROWS, HEADER_BYTES, N_PAIRS

# Of the messages of `wire`; the kernel knows where the fields of a header are, too.
_REQUEST, _REPLY = (int.from_bytes(begin, "little") for begin in (b"XMSH\1\1\0\0", b"XMSH\1\2\0\0"))  # of float32
_MOST_CHOICES = 8  # a token; who chooses more is answered in the usual way

_AT_ROWS, _AT_MESSAGE, _AT_BYTES, _AT_REPLY = 13, 18, 19, 23


class Answers:
    """Answers requests with the experts of `layers`. Not thread-safe."""

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        """`layers` have kernels."""
        first = layers[0]
        d, f, n_experts = first.hidden_size, first.ffn_size, first.n_experts
        self._row_bytes = 4 * d
        self._most_pairs = most_pairs = FEW_ROWS * min(n_experts, _MOST_CHOICES)
        self._addresses_L2 = torch.tensor([layer.addresses for layer in layers])
        self._places = torch.empty(n_experts + 1 + 2 * most_pairs, dtype=torch.int64)
        self._hidden_PF = torch.empty(most_pairs, f)
        starts = self._places.data_ptr()
        token_rows = starts + 8 * (n_experts + 1)
        self._team = native.team(first.expert_bytes)
        self._args = array(
            "q",
            (
                *(0, 0, 0, native.barrier(self._team), d, f, n_experts, FEW_ROWS, 0),
                *(starts, token_rows, token_rows + 8 * most_pairs, self._hidden_PF.data_ptr(), 0),
                *(native.KINDS[first.weight_dtype], 4 * f),
                *(0, 0, 0, 0, len(layers), self._addresses_L2.data_ptr(), _REQUEST, 0, _REPLY, most_pairs),
            ),
        )

    def answer(self, message: memoryview) -> memoryview | None:
        """The reply to a whole request, header and all; None where it has to be answered in the usual way.

        That is so for many rows, for experts that are not held and for whatever is wrong.
        """
        if len(message) < HEADER_BYTES:
            return None
        n_pairs: int = N_PAIRS.unpack_from(message)[0]
        if n_pairs > self._most_pairs:
            return None
        reply = torch.empty(HEADER_BYTES + n_pairs * self._row_bytes, dtype=torch.uint8)
        address, args = reply.data_ptr(), self._args
        args[0] = args[1] = args[2] = 0
        args[_AT_MESSAGE], args[_AT_BYTES] = torch.frombuffer(message, dtype=torch.uint8).data_ptr(), len(message)
        args[_AT_REPLY], args[_AT_ROWS] = address, address + HEADER_BYTES
        # Only the second is for all threads: the others take longer to wake up than the first one to read.
        if not native.read_request.run_alone(args):
            return None
        args[0] = 0
        native.experts_pairs.run(self._team, args)
        return reply.numpy().data
