"""`python -m benchmarks.standby`: what it costs to be ready for moves, losses and rebalancing while nothing happens.

- In the step loop of a router, with expert workers on this machine. Ready: two homes of every expert, rows counted,
  deadlines learned, epochs of dispatches kept, load read and told once a second. Else: one home, and none of it.
- With `--url`, in a running cluster on this machine: its controller at work, with the heartbeats of all processes, the
  sweep, the rebalancer and the autoscaler, and stopped. Best served with `--spare-replicas 1 --rebalance auto`.

Both in turns, as tokens per second.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import statistics
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch
from urllib.parse import urlsplit

import psutil
import torch
import typer
from torch import Tensor

from benchmarks.command import run
from benchmarks.engine import random_model
from benchmarks.engine_runner import EngineRunner
from benchmarks.local_cluster import local_cluster
from cluster.bench.chaos_stream import requests
from cluster.bench.common import console, machine, print_json
from cluster.bench.gateway import AsJson, Key, connect
from cluster.bench.rebalance import Traffic
from cluster.control.view import Member
from cluster.fleet.status import processes
from cluster.placement.placement import Placement
from cluster.router.exchange.captured_steps import CapturedSteps
from cluster.router.exchange.counters import Traffic as Uncounted
from cluster.router.exchange.exchange import Exchange
from cluster.router.exchange.sender import Part, Sender
from cluster.router.exchange.views import Views
from cluster.router.exchange.worker_pool import WorkerPool
from workers.kernels.threads import worker_threads
from workers.transport.base import Rows
from workers.transport.shm.router import ShmWay

N_WORKERS = 2
_RUNS = 2  # of decoding for one figure: so long that there is a heartbeat in each
_HEARTBEAT_S = 1.0
_SETTLE_S = 3.0  # after the controller goes on
_NO_TRAFFIC = Uncounted()


def standby(
    model: Annotated[
        Path | None, typer.Option(help="checkpoint directory; default: a random one of 200 million parameters")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences that decode together")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of runs, of whose differences the median counts")] = 12,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores")] = 0,
    url: Annotated[str | None, typer.Option(help="a running cluster's gateway, to measure its controller")] = None,
    key: Key = None,
    seconds: Annotated[float, typer.Option(min=1, help="of each measurement of a running cluster")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Throughput lost by being ready, in percent: runs of decoding, alternating."""
    if url is None:
        ready, bare = _step_loop(model or random_model(), batch, repeats, threads or len(os.sched_getaffinity(0)))
    else:
        ready, bare = asyncio.run(_controller(url, key, batch, repeats, seconds))
    lost = statistics.median(100 * (b - a) / b for a, b in zip(ready, bare, strict=True))
    result: dict[str, Any] = {
        "measured": "the step loop" if url is None else "the controller", "machine": machine(), "batch": batch,
        "repeats": repeats, "ready_tokens_per_second": statistics.median(ready),
        "bare_tokens_per_second": statistics.median(bare), "lost_percent": round(lost, 2),
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    print(f"{result['ready_tokens_per_second']:.1f} tokens/s ready, {result['bare_tokens_per_second']:.1f} without")
    print(f"{result['measured']}: being ready costs {lost:.2f} % at batch {batch} (median of {repeats} pairs)")


def _step_loop(directory: Path, batch: int, repeats: int, n_threads: int) -> tuple[list[float], list[float]]:
    """Tokens per second, ready and not, pair by pair; which comes first alternates, and the first pair warms up."""
    torch.set_num_threads(n_threads)
    ready: list[float] = []
    bare: list[float] = []
    threads = worker_threads(n_threads, N_WORKERS)
    with local_cluster(directory, N_WORKERS, threads, (ShmWay(),), n_homes=2) as exchange:
        placement, addresses = exchange._views.published
        runner = EngineRunner("cluster", directory, exchange)
        for turn in range(repeats + 1):
            for is_ready in (True, False) if turn % 2 else (False, True):
                exchange.publish(_first_homes(placement, exchange.epoch + 1, 2 if is_ready else 1), addresses)
                with _heartbeats(exchange) if is_ready else _nothing_kept():
                    figures = [runner.decode(batch) for _ in range(_RUNS)]
                (ready if is_ready else bare).append(statistics.mean(figures))
            _tell(turn, repeats, ready, bare)
    return ready[1:], bare[1:]


def _first_homes(placement: Placement, epoch: int, n: int) -> Placement:
    """At most `n` homes of each expert, those with a share first: where rows go stays the same."""
    homes = [
        [dict(sorted(here.items(), key=lambda home: -home[1])[:n]) for here in experts] for experts in placement.homes()
    ]
    return Placement.of(epoch, placement.workers, homes, placement.pins)


@contextmanager
def _heartbeats(exchange: Exchange) -> Iterator[None]:
    """Once a second what a router tells of itself is put together, as for the controller."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_HEARTBEAT_S):
            load = exchange.load()
            member = Member("router", "router-0", os.getpid(), "node", "ready", "", epoch=exchange.epoch, load=load)
            pickle.dumps(member)

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without what is kept for the controller, for moves and for losses."""
    with ExitStack() as stack:
        for owner, name, instead in (
            (CapturedSteps, "end", _end), (Sender, "send", _send), (Sender, "receive", _receive),
            (WorkerPool, "came", lambda *_: None), (Views, "enter", _enter), (Views, "leave", lambda *_: None),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, instead))
        yield


def _end(captured: CapturedSteps) -> bool:
    captured._step = None
    return captured._way.end_step() is not None


def _send(sender: Sender, worker: int, rows: Rows, at: slice | Tensor, out_PD: Tensor) -> Part:
    return Part(rows, at, sender.pool.send(sender.routes.workers[worker], rows, out_PD), _NO_TRAFFIC)


def _receive(sender: Sender, parts: Iterable[Part], rows_PD: Tensor) -> list[Part]:
    for part in parts:
        sender.pool.wait(part.reply)
    return [part for part in parts if part.reply.loss is not None]


def _enter(views: Views) -> tuple[int, bool]:
    changed = views._take()
    return views.current.placement.epoch, changed


async def _controller(
    url: str, key: str | None, batch: int, repeats: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Tokens per second with the controller at work and stopped, pair by pair."""
    client, port = await connect(url, key), urlsplit(url).port
    fleet = await asyncio.to_thread(processes, port)
    controller = psutil.Process(next(each["pid"] for each in fleet if each["role"] == "controller"))
    ready: list[float] = []
    bare: list[float] = []
    async with Traffic(client, requests(batch, 128)) as traffic:
        await traffic.rate(seconds)
        for turn in range(repeats):
            for is_ready in (True, False) if turn % 2 else (False, True):
                if is_ready:
                    ready.append(await traffic.rate(seconds))
                    continue
                controller.send_signal(signal.SIGSTOP)
                try:
                    bare.append(await traffic.rate(seconds))
                finally:
                    controller.send_signal(signal.SIGCONT)
                await traffic.rate(_SETTLE_S)
            _tell(turn + 1, repeats, ready, bare)
    return ready, bare


def _tell(turn: int, repeats: int, ready: list[float], bare: list[float]) -> None:
    said = f"  pair {turn} of {repeats}: {ready[-1]:.1f} tokens/s ready, {bare[-1]:.1f} without"
    console.print(said, style="dim", highlight=False)


if __name__ == "__main__":
    run(standby)
