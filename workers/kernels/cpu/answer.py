"""Requests of few rows, answered by two kernel calls: what a decoding step asks of an expert worker.

A worker that computed has little of its Python left in the caches, and what is microseconds of code takes as long as
reading an expert then. So one kernel reads and checks the request, another computes into the reply.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.kernels.cpu import kernel
from workers.kernels.cpu.arguments import Experts, ReadRequest
from workers.kernels.cpu.experts import expert_arguments, n_places
from workers.kernels.cpu.kernel import HEAD
from workers.kernels.experts import LayerExperts
from workers.kernels.message import FEW_ROWS, HEADER_BYTES
from workers.wire import REPLY, REQUEST, first_word, pairs_of

# Of the messages of `wire`; the kernel knows where the fields of a header are, too.
_REQUEST, _REPLY = (first_word(kind, torch.float32) for kind in (REQUEST, REPLY))
_MOST_CHOICES = 8  # a token; who chooses more is answered in the usual way
_MESSAGE, _BYTES, _N_PAIRS, _REPLY_AT = (
    HEAD + ReadRequest._fields.index(name) for name in ("message", "n_bytes", "n_pairs", "reply")
)
_Y = HEAD + Experts._fields.index("y")


class CpuAnswers:
    """Answers requests with the experts of `layers`. Not thread-safe."""

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        first = layers[0]
        self._row_bytes = 4 * first.hidden_size
        self._most_pairs = most_pairs = FEW_ROWS * min(first.n_experts, _MOST_CHOICES)
        self._memory = (
            torch.tensor([[layer.address_E2.data_ptr(), layer.rows_E.data_ptr()] for layer in layers]),
            torch.empty(n_places(first.n_experts, most_pairs), dtype=torch.int64),
            torch.empty(most_pairs, first.ffn_size),
            torch.empty(2 * most_pairs, dtype=torch.int32),
        )
        tables, places, hidden_PF, copies = self._memory
        self._bytes = first.expert_bytes
        pairs, products = expert_arguments(first, hidden_PF, places, most_pairs)
        self._pairs, self._experts = kernel.pairs.arguments(1, pairs), kernel.experts.arguments(1, products)
        self._read = kernel.read_request.arguments(
            1,
            ReadRequest(
                message=0,
                n_bytes=0,
                request_word=_REQUEST,
                reply=0,
                reply_word=_REPLY,
                tables=tables.data_ptr(),
                n_layers=len(layers),
                n_pairs=0,
                pairs=self._pairs.buffer_info()[0],
                experts=self._experts.buffer_info()[0],
                d=first.hidden_size,
                copies=copies.data_ptr(),
            ),
        )

    def answer(self, message: memoryview) -> memoryview | None:
        n_pairs = pairs_of(message) if len(message) >= HEADER_BYTES else 0
        n_bytes = self.reply_bytes(n_pairs)
        if not n_bytes:
            return None
        reply = torch.empty(n_bytes, dtype=torch.uint8)
        request = torch.frombuffer(message, dtype=torch.uint8)
        is_answered = self.answer_at(request.data_ptr(), len(message), n_pairs, reply.data_ptr())
        return reply.numpy().data if is_answered else None

    def reply_bytes(self, n_pairs: int) -> int:
        return HEADER_BYTES + n_pairs * self._row_bytes if 0 < n_pairs <= self._most_pairs else 0

    def answer_at(self, request: int, n_bytes: int, n_pairs: int, reply: int) -> bool:
        read, products, team = self._read, self._experts, kernel.team(self._bytes)
        read[0] = 0
        read[_MESSAGE], read[_BYTES], read[_N_PAIRS], read[_REPLY_AT] = request, n_bytes, n_pairs, reply
        # Only the second is for all threads: the others take longer to wake up than the first one to read.
        kernel.read_request.run(1, read)
        if not read[0]:
            return False
        products[0] = products[1] = products[2] = 0
        products[3], products[_Y] = kernel.barrier(team), reply + HEADER_BYTES
        kernel.experts.run(team, products)
        return True
