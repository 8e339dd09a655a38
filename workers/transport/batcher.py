"""Rows of several routers that wait for the same layer at the same time are computed as one batch.

Reading the weights of an expert costs more than a few rows, so two routers at the same layer should share one read.
No thread is handed anything: whoever gets the lock computes for all who wait for its layer.
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

from workers.shard import ExpertShard
from workers.wire import Request


@dataclass(slots=True, eq=False)
class _Job:
    layer: int
    request: Request
    is_wanted: Callable[[], bool]
    y_PD: Tensor | None = None
    error: Exception | None = None
    compute_ns: int = 0


class Batcher:
    """Computes requests of many threads on one shard. Legend: T token rows, P pairs, D hidden size."""

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard
        self._computing = threading.Lock()
        self._waiting: list[_Job] = []
        self.rows = 0  # pairs computed since start
        self.compute_seconds = 0.0

    def compute(self, layer: int, request: Request, is_wanted: Callable[[], bool]) -> tuple[Tensor, int]:
        """y_PD in host memory, and the nanoseconds its batch took. Raises what the shard raises.

        Whoever waited long may be gone: where `is_wanted` has become false nothing is computed, and CancelledError
        raised.
        """
        job = _Job(layer, request, is_wanted)
        self._waiting.append(job)
        with self._computing:
            if job.y_PD is None and job.error is None:
                self._take(layer)
        if job.error is not None:
            raise job.error
        assert job.y_PD is not None
        return job.y_PD, job.compute_ns

    def _take(self, layer: int) -> None:
        jobs = [job for job in self._waiting if job.layer == layer]
        for job in jobs:
            self._waiting.remove(job)
        wanted = []
        for job in jobs:
            if job.is_wanted():
                wanted.append(job)
            else:
                job.error = CancelledError()
        if wanted:
            self._compute(wanted)

    def _compute(self, jobs: list[_Job]) -> None:
        began = time.perf_counter_ns()
        try:
            replies = self._forward(jobs[0].layer, [job.request for job in jobs])
        except Exception as error:
            # One router's rows must not fail another's: alone, each gets its own answer.
            if len(jobs) > 1:
                for job in jobs:
                    self._compute([job])
                return
            jobs[0].error = error
            return
        spent = time.perf_counter_ns() - began
        self.compute_seconds += spent / 1e9
        for job, y_PD in zip(jobs, replies, strict=True):
            job.compute_ns = spent
            job.y_PD = y_PD
            self.rows += len(y_PD)

    def _forward(self, layer: int, requests: Sequence[Request]) -> list[Tensor]:
        device = self._shard.device
        if len(requests) == 1:
            x_TD, token_P, expert_P = requests[0]
            if device.type != "cpu":
                x_TD, token_P, expert_P = x_TD.to(device), token_P.to(device), expert_P.to(device)
            return [self._shard.forward(layer, x_TD, token_P, expert_P).cpu()]
        firsts = [0, *itertools.accumulate(len(request.x_TD) for request in requests)]
        x_TD = torch.cat([request.x_TD for request in requests])
        token_P = torch.cat([request.token_P + first for first, request in zip(firsts, requests, strict=False)])
        expert_P, order_P = torch.cat([request.expert_P for request in requests]).sort(stable=True)
        sorted_PD = self._shard.forward(layer, x_TD.to(device), token_P[order_P].to(device), expert_P.to(device)).cpu()
        y_PD = torch.empty_like(sorted_PD)
        y_PD[order_P] = sorted_PD
        return list(torch.split(y_PD, [len(request.token_P) for request in requests]))
