"""Rows of several routers that wait for the same layer at the same time are computed as one batch.

Reading the weights of an expert costs more than a few rows, so two routers at the same layer should share one read.
No thread is handed anything: whoever gets the lock computes for all who wait for its layer.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import torch
from torch import Tensor

from workers import wire
from workers.device import end_if_lost, on_host, to_device
from workers.errors import ExpertMeshError, WireError
from workers.kernels.mutex import Mutex
from workers.kernels.ops import RingLoop, Rings
from workers.shard import ExpertShard
from workers.wire import Header, Request

_log = logging.getLogger(__name__)

_SIZES = 14


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits, or why it need not."""

    header: Header
    request: Request
    is_wanted: Callable[[], bool]
    out_PD: Tensor | None  # on the CPU: where the rows may be computed to, if the request is alone
    result: Tensor | Exception | None = None
    queued_ns: int = 0
    compute_ns: int = 0


class Batcher:
    """Computes requests of many threads on one shard. Legend: T token rows, P pairs, D hidden size."""

    def __init__(self, shard: ExpertShard, home: torch.device | str = "cpu") -> None:
        """home: the device that results are wanted on."""
        self.shard = shard
        self._home = torch.device(home)
        self._computing = Mutex()
        self._waiting: list[Job] = []
        self.waited_seconds = 0.0  # of all requests together since start, until they were computed
        self._step_pairs = self._step_ns = 0
        self._counts = array("q", bytes(8 * (2 + _SIZES + 2)))  # kernels add to it too

    @property
    def rows(self) -> int:
        """Pairs computed since start."""
        return self._counts[0] + self._step_pairs

    @property
    def compute_seconds(self) -> float:
        """Since start."""
        return (self._counts[1] + self._step_ns) / 1e9

    @property
    def call_rows(self) -> int:
        """Those of `calls`: the rest are of captured steps."""
        return self._counts[0]

    @property
    def calls(self) -> list[int]:
        """Since start, by their pairs: at most 1, 2, 4, ... 2 ** 14, and more."""
        return self._counts[2:].tolist()

    def stepped(self, n_pairs: int, spent_ns: int) -> None:
        """A captured step computed so many pairs, beside the requests. One thread says so."""
        self._step_pairs += n_pairs
        self._step_ns += spent_ns

    def respond(
        self, header: Header, request: Request, is_wanted: Callable[[], bool], out_PD: Tensor | None = None
    ) -> tuple[Tensor, int] | str | None:
        """y_PD at home and the nanoseconds its batch took; or why it was not computed; None: nobody wants it any more.

        Whoever waited long may be gone: where `is_wanted` has become false nothing is computed. Raises nothing: a
        worker lives on for the other routers.
        """
        return self.outcome(self.enqueue(header, request, is_wanted, out_PD))

    def enqueue(
        self, header: Header, request: Request, is_wanted: Callable[[], bool], out_PD: Tensor | None = None
    ) -> Job:
        """The first half of `respond`: from now on the request is part of the next batch of its layer."""
        job = Job(header, request, is_wanted, out_PD)
        try:
            self._check(header, request)
        except WireError as error:
            job.result = error
        else:
            job.queued_ns = time.perf_counter_ns()
            self._waiting.append(job)
        return job

    def outcome(self, job: Job) -> tuple[Tensor, int] | str | None:
        """The second half: compute, unless another thread has done it."""
        if job.result is None:
            with self._computing:
                if job.result is None:
                    self._take(job.header.tag.layer)
        assert job.result is not None
        if isinstance(job.result, Tensor):
            return job.result, job.compute_ns
        return None if isinstance(job.result, CancelledError) else reason(job.header, job.result)

    def answer(self, message: memoryview) -> memoryview | None:
        """The reply to a whole message that is a request of few rows, alone.

        None where it has to be parsed first, or something else is being computed.
        """
        if not self._computing.acquire(blocking=False):
            return None
        try:
            began = time.perf_counter_ns()
            reply = self.shard.answer(message)
            if reply is not None:
                spent = time.perf_counter_ns() - began
                self._count(wire.stamp(reply, spent), spent)
            return reply
        finally:
            self._computing.release()

    def loop(self, rings: Rings, threads: int, cores: int) -> RingLoop | None:
        """`ExpertShard.loop`. It returns while somebody else computes: then it is better to be one batch with who else
        waits."""
        return self.shard.loop(rings, threads, cores, self._computing, self._counts)

    def _compute(self, layer: int, jobs: Sequence[Job]) -> list[tuple[Tensor | Exception, int]]:
        """For each job y_PD, or what the shard raised, and the nanoseconds its batch took."""
        began = time.perf_counter_ns()
        try:
            replies = self._forward(layer, jobs)
        except Exception as error:
            end_if_lost(self.shard.device, error)
            # One router's rows must not fail another's: alone, each gets its own answer.
            if len(jobs) > 1:
                return [self._compute(layer, [job])[0] for job in jobs]
            return [(error, 0)]
        spent = time.perf_counter_ns() - began
        self._count(sum(map(len, replies)), spent)
        return [(y_PD, spent) for y_PD in replies]

    def _count(self, n_pairs: int, spent_ns: int) -> None:
        self._counts[0] += n_pairs
        self._counts[1] += spent_ns
        self._counts[2 + min((n_pairs - 1).bit_length(), _SIZES + 1)] += 1

    def _take(self, layer: int) -> None:
        jobs = [job for job in self._waiting if job.header.tag.layer == layer]
        for job in jobs:
            self._waiting.remove(job)
        wanted = []
        for job in jobs:
            if job.is_wanted():
                wanted.append(job)
            else:
                job.result = CancelledError()
        if wanted:
            now = time.perf_counter_ns()
            self.waited_seconds += sum(now - job.queued_ns for job in wanted) / 1e9
            results = self._compute(layer, wanted)
            for job, (result, compute_ns) in zip(wanted, results, strict=True):
                job.result, job.compute_ns = result, compute_ns

    def _forward(self, layer: int, jobs: Sequence[Job]) -> list[Tensor]:
        device, requests = self.shard.device, [job.request for job in jobs]
        if len(requests) == 1:
            x_TD, token_P, expert_P = requests[0]
            if device.type == "cpu":
                return [self.shard.forward(layer, x_TD, token_P, expert_P, jobs[0].out_PD).to(self._home)]
            # Pairs stay on the host, where it is seen whether their experts are held.
            return [self._at_home(self.shard.forward(layer, to_device(x_TD, device), token_P, expert_P))]
        firsts = [0, *itertools.accumulate(len(request.x_TD) for request in requests)]
        x_TD = torch.cat([request.x_TD for request in requests])
        token_P = torch.cat([request.token_P + first for first, request in zip(firsts, requests, strict=False)])
        expert_P, order_P = torch.cat([request.expert_P for request in requests]).sort(stable=True)
        sorted_PD = self._at_home(self.shard.forward(layer, to_device(x_TD, device), token_P[order_P], expert_P))
        y_PD = torch.empty_like(sorted_PD)
        y_PD[order_P.to(self._home)] = sorted_PD
        return list(torch.split(y_PD, [len(request.token_P) for request in requests]))

    def _at_home(self, y_PD: Tensor) -> Tensor:
        return on_host(y_PD)[0] if self._home.type == "cpu" else y_PD.to(self._home)

    def _check(self, header: Header, request: Request) -> None:
        """Raises WireError for rows that the shard cannot compute."""
        shard, layer = self.shard, header.tag.layer
        if (header.width, header.dtype) != (shard.hidden_size, shard.dtype):
            raise WireError(f"rows of {header.width} {header.dtype}, not {shard.hidden_size} {shard.dtype}")
        if layer >= shard.n_layers or int(request.expert_P[-1]) >= shard.n_experts:
            raise WireError(f"layer {layer}, expert {int(request.expert_P[-1])}: the model does not have it")


def reason(header: Header, error: Exception) -> str:
    """For the router, which repairs this elsewhere."""
    if isinstance(error, ExpertMeshError):
        return str(error)
    _log.error("layer %d, %d pairs", header.tag.layer, header.n_pairs, exc_info=error)
    return f"{type(error).__name__}: {error}"
