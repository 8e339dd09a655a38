"""Rows of several routers that wait for the same layer at the same time are computed as one batch.

Reading the weights of an expert costs more than a few rows, so two routers at the same layer should share one read.
With a thread for each router (`compute`) no thread is handed anything: whoever gets the lock computes for all who wait
for its layer. One thread for all routers knows what waits, and calls `compute_batch`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import torch
from torch import Tensor

from workers import wire
from workers.shard import ExpertShard
from workers.wire import Request


@dataclass(slots=True, eq=False)
class _Job:
    layer: int
    request: Request
    is_wanted: Callable[[], bool]
    result: Tensor | Exception | None = None
    compute_ns: int = 0


class Batcher:
    """Computes requests of many threads on one shard. Legend: T token rows, P pairs, D hidden size."""

    def __init__(self, shard: ExpertShard, home: torch.device | str = "cpu") -> None:
        """home: the device that results are wanted on."""
        self._shard = shard
        self._home = torch.device(home)
        self._computing = threading.Lock()
        self._waiting: list[_Job] = []
        self.rows = 0  # pairs computed since start
        self.compute_seconds = 0.0

    def compute(self, layer: int, request: Request, is_wanted: Callable[[], bool]) -> tuple[Tensor, int]:
        """y_PD, and the nanoseconds its batch took. Raises what the shard raises.

        Whoever waited long may be gone: where `is_wanted` has become false nothing is computed, and CancelledError
        raised.
        """
        job = _Job(layer, request, is_wanted)
        self._waiting.append(job)
        with self._computing:
            if job.result is None:
                self._take(layer)
        assert job.result is not None
        if isinstance(job.result, Exception):
            raise job.result
        return job.result, job.compute_ns

    def answer(self, message: memoryview) -> memoryview | None:
        """The reply to a whole message that is a request of few rows, alone; None where it has to be parsed first."""
        began = time.perf_counter_ns()
        reply = self._shard.answer(message)
        if reply is not None:
            spent = time.perf_counter_ns() - began
            self.rows += wire.stamp(reply, spent)
            self.compute_seconds += spent / 1e9
        return reply

    def answer_at(self, request: int, n_bytes: int, n_pairs: int, reply: memoryview, reply_at: int) -> bool:
        """`ExpertShard.answer_at`, unless somebody computes: then it is better to be one batch with who else waits."""
        if not self._computing.acquire(blocking=False):
            return False
        try:
            began = time.perf_counter_ns()
            if not self._shard.answer_at(request, n_bytes, n_pairs, reply_at):
                return False
            spent = time.perf_counter_ns() - began
            self.rows += wire.stamp(reply, spent)
            self.compute_seconds += spent / 1e9
            return True
        finally:
            self._computing.release()

    def compute_batch(self, layer: int, requests: Sequence[Request]) -> list[tuple[Tensor | Exception, int]]:
        """For each request y_PD, or what the shard raised, and the nanoseconds its batch took."""
        began = time.perf_counter_ns()
        try:
            replies = self._forward(layer, requests)
        except Exception as error:
            # One router's rows must not fail another's: alone, each gets its own answer.
            if len(requests) > 1:
                return [self.compute_batch(layer, [request])[0] for request in requests]
            return [(error, 0)]
        spent = time.perf_counter_ns() - began
        self.compute_seconds += spent / 1e9
        self.rows += sum(map(len, replies))
        return [(y_PD, spent) for y_PD in replies]

    def _take(self, layer: int) -> None:
        jobs = [job for job in self._waiting if job.layer == layer]
        for job in jobs:
            self._waiting.remove(job)
        wanted = []
        for job in jobs:
            if job.is_wanted():
                wanted.append(job)
            else:
                job.result = CancelledError()
        if wanted:
            results = self.compute_batch(layer, [job.request for job in wanted])
            for job, (result, compute_ns) in zip(wanted, results, strict=True):
                job.result, job.compute_ns = result, compute_ns

    def _forward(self, layer: int, requests: Sequence[Request]) -> list[Tensor]:
        device = self._shard.device
        if len(requests) == 1:
            x_TD, token_P, expert_P = requests[0]
            if device.type != "cpu":
                x_TD, token_P, expert_P = x_TD.to(device), token_P.to(device), expert_P.to(device)
            return [self._shard.forward(layer, x_TD, token_P, expert_P).to(self._home)]
        firsts = [0, *itertools.accumulate(len(request.x_TD) for request in requests)]
        x_TD = torch.cat([request.x_TD for request in requests])
        token_P = torch.cat([request.token_P + first for first, request in zip(firsts, requests, strict=False)])
        expert_P, order_P = torch.cat([request.expert_P for request in requests]).sort(stable=True)
        sorted_PD = self._shard.forward(layer, x_TD.to(device), token_P[order_P].to(device), expert_P.to(device))
        sorted_PD = sorted_PD.to(self._home)
        y_PD = torch.empty_like(sorted_PD)
        y_PD[order_P.to(self._home)] = sorted_PD
        return list(torch.split(y_PD, [len(request.token_P) for request in requests]))
