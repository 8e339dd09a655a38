"""Requests of few rows, answered by two kernel calls: what a decoding step asks of an expert worker.

A worker that computed has little of its Python left in the caches, and what is microseconds of code takes as long as
reading an expert then. So one kernel reads and checks the request, another computes into the reply.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from workers.kernels.cpu import kernel
from workers.kernels.cpu.arguments import Experts, ReadRequest, RingServe
from workers.kernels.cpu.experts import expert_arguments, n_places
from workers.kernels.cpu.kernel import HEAD
from workers.kernels.cpu.system import system
from workers.kernels.experts import LayerExperts
from workers.kernels.message import FEW_ROWS, HEADER_BYTES
from workers.kernels.mutex import Mutex
from workers.kernels.ops import Rings
from workers.wire import REPLY, REQUEST, first_word, pairs_of

# Of the messages of `wire`; the kernel knows where the fields of a header are, too.
_REQUEST, _REPLY = (first_word(kind, torch.float32) for kind in (REQUEST, REPLY))
_MOST_CHOICES = 8  # a token; who chooses more is answered in the usual way
_MESSAGE, _BYTES, _N_PAIRS, _REPLY_AT = (
    HEAD + ReadRequest._fields.index(name) for name in ("message", "n_bytes", "n_pairs", "reply")
)
_RECEIVED, _FREED, _CLOSED = (HEAD + RingServe._fields.index(name) for name in ("received", "freed", "closed"))
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
            torch.empty(most_pairs, 2 * first.ffn_size),
            torch.empty(2 * most_pairs, dtype=torch.int32),
        )
        tables, places, hidden_P2F, copies = self._memory
        self._bytes = first.expert_bytes
        pairs, products = expert_arguments(first, hidden_P2F, places, most_pairs)
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
        if not 0 < n_pairs <= self._most_pairs:
            return None
        reply = torch.empty(HEADER_BYTES + n_pairs * self._row_bytes, dtype=torch.uint8)
        read, products, team = self._read, self._experts, kernel.team(self._bytes)
        read[0], at = 0, torch.frombuffer(message, dtype=torch.uint8).data_ptr()
        read[_MESSAGE], read[_BYTES], read[_N_PAIRS], read[_REPLY_AT] = at, len(message), n_pairs, reply.data_ptr()
        # Only the second is for all threads: the others take longer to wake up than the first one to read.
        kernel.read_request.run(1, read)
        if not read[0]:
            return None
        products[0] = products[1] = products[2] = 0
        products[3], products[_Y] = kernel.barrier(team), reply.data_ptr() + HEADER_BYTES
        kernel.experts.run(team, products)
        return reply.numpy().data

    def loop(self, rings: Rings, threads: int, cores: int, locks: tuple[Mutex, Mutex], counts: array[int]) -> RingLoop:
        team = threads if self._bytes >= kernel.PARALLEL_BYTES and kernel.parallel() else 1
        computing, holding = locks
        values = RingServe(
            requests=rings.requests, replies=rings.replies, ring_bytes=rings.n_bytes, received=0, freed=0, closed=0,
            waited_ns=0, computing=computing.address, holding=holding.address, counts=counts.buffer_info()[0],
            n_sizes=len(counts) - 2, threads=team, cores=cores, barrier=kernel.barrier(team),
            read=self._read.buffer_info()[0], products=kernel.experts.address,
            experts=self._experts.buffer_info()[0], most_pairs=self._most_pairs, d=self._row_bytes // 4,
            system=system(),
        )  # fmt: skip
        return RingLoop(kernel.ring_serve.arguments(1, values), (self, locks, counts))


class RingLoop:
    """Answers what comes in one ring into another; see `arguments.RingServe`."""

    def __init__(self, args: array[int], held: object) -> None:
        """held: what `args` point to."""
        self._args = args
        self._held = held

    def run(self, received: int, freed: int) -> tuple[int, int]:
        self._args[_RECEIVED], self._args[_FREED] = received, freed
        kernel.ring_serve.run(1, self._args)
        return self._args[_RECEIVED], self._args[_FREED]

    def close(self) -> None:
        self._args[_CLOSED] = 1
