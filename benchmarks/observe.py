"""`python -m benchmarks.observe`: what being observed costs a router and its expert workers.

Everything on: all processes scraped every five seconds by another process, every step traced and its spans encoded for
a collector. Everything off: no scrape, no trace, and an exchange and a step loop that count rows (for the placement)
but no time, byte or histogram.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import torch
import typer

from benchmarks.command import run
from benchmarks.engine import random_model
from benchmarks.engine_runner import EngineRunner
from benchmarks.local_cluster import local_cluster
from cluster.bench.common import console, machine, print_json
from cluster.observe import tracing
from cluster.observe.distribution import Distribution
from cluster.observe.endpoint import Endpoint
from cluster.observe.exposition import Readings
from cluster.router import readings
from cluster.router.exchange.captured_steps import CapturedSteps
from cluster.router.exchange.counters import Traffic
from cluster.router.exchange.exchange import Exchange
from cluster.router.exchange.sender import Part, Sender
from workers.kernels.threads import worker_threads
from workers.transport.shm.router import ShmWay

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from torch import Tensor

    from workers.transport.base import Rows

N_WORKERS = 2
_RUNS = 4  # of decoding for one figure, so that it lasts as long as from one scrape to the next
_TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_SCRAPER = """
import sys, time, urllib.request
while True:
    for url in sys.argv[1:]:
        urllib.request.urlopen(url).read()
    print("scraped", flush=True)
    time.sleep(5)
"""
_UNCOUNTED = Traffic()


def observe(
    model: Annotated[
        Path | None, typer.Option(help="checkpoint directory; default: a random one of 200 million parameters")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences that decode together")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="pairs of runs, of whose differences the median counts")] = 12,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores")] = 0,
    traces: Annotated[bool, typer.Option(help="trace every step too")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Throughput lost by everything on against everything off, in percent: runs of decoding, alternating."""
    directory, n_threads = model or random_model(), threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    urls: list[str] = []
    with local_cluster(directory, N_WORKERS, worker_threads(n_threads, N_WORKERS), (ShmWay(),), urls) as exchange:
        runner = EngineRunner("cluster", directory, exchange)
        endpoint = Endpoint(Readings("router-0", [lambda: _readings(runner, exchange)]), "127.0.0.1")
        on, off = measure(runner, [endpoint.url, *urls], batch, repeats, traces)
    lost = statistics.median(100 * (b - a) / b for a, b in zip(on, off, strict=True))
    result: dict[str, Any] = {
        "model": str(directory), "machine": machine(), "batch": batch, "repeats": repeats, "traces": traces,
        "on_tokens_per_second": statistics.median(on), "off_tokens_per_second": statistics.median(off),
        "lost_percent": round(lost, 2),
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print(f"{result['on_tokens_per_second']:.1f} tokens/s on, {result['off_tokens_per_second']:.1f} off")
        print(f"observing costs {lost:.2f} % of throughput at batch {batch} (median of {repeats} pairs)")


def measure(
    runner: EngineRunner, urls: Sequence[str], batch: int, repeats: int, traces: bool
) -> tuple[list[float], list[float]]:
    """Tokens per second, on and off, pair by pair; which comes first alternates, and the first pair warms up."""
    on: list[float] = []
    off: list[float] = []
    processor = _encoded() if traces else None
    with scraper_of(urls) as scraper:
        for turn in range(repeats + 1):
            console.print(f"  pair {turn} of {repeats}", style="dim", highlight=False)
            for observed in (True, False) if turn % 2 else (False, True):
                with everything_on(scraper, processor) if observed else everything_off():
                    traceparent = _TRACEPARENT if observed else ""
                    figures = [runner.decode(batch, traceparent) for _ in range(_RUNS)]
                    (on if observed else off).append(statistics.mean(figures))
    if processor is not None:
        processor.shutdown()
    return on[1:], off[1:]


@contextmanager
def scraper_of(urls: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that scrapes every five seconds, stopped for the moment."""
    with subprocess.Popen([sys.executable, "-c", _SCRAPER, *urls], stdout=subprocess.PIPE) as scraper:
        try:
            assert scraper.stdout is not None
            scraper.stdout.readline()
            scraper.send_signal(signal.SIGSTOP)
            yield scraper
        finally:
            scraper.kill()


@contextmanager
def everything_on(scraper: subprocess.Popen[bytes], processor: SpanProcessor | None) -> Iterator[None]:
    """Scraped and traced."""
    tracing.install(processor, "router-0")
    scraper.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        scraper.send_signal(signal.SIGSTOP)
        tracing.install(None, "router-0")
        if processor is not None:  # what is left is not encoded while nothing is to be on
            processor.force_flush()


@contextmanager
def everything_off() -> Iterator[None]:
    """Without what is counted for people alone."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Sender, "send", _send))
        stack.enter_context(patch.object(Sender, "receive", _receive))
        stack.enter_context(patch.object(CapturedSteps, "_count", lambda *_: None))
        stack.enter_context(patch.object(Distribution, "add", lambda *_: None))
        yield


def _send(sender: Sender, worker: int, rows: Rows, at: slice | Tensor, out_PD: Tensor) -> Part:
    name = sender.routes.workers[worker]
    has_other = sender.routes.has_others(rows.tag.layer, worker)
    return Part(rows, at, sender.pool.send(name, rows, out_PD, has_other), _UNCOUNTED)


def _receive(sender: Sender, parts: Iterable[Part], rows_PD: Tensor) -> list[Part]:
    for part in parts:
        sender.pool.wait(part.reply)
        sender.counters.add_rows(part.reply.worker, part.rows.tag.layer, part.rows.n_pairs)
    return [part for part in parts if part.reply.loss is not None]


def _readings(runner: EngineRunner, exchange: Exchange) -> Iterable[Any]:
    yield from readings.of_engine(runner.engine)
    yield from readings.of_exchange(exchange, per_expert=True)


def _encoded() -> SpanProcessor:
    """Collects spans and encodes them as for a collector, in a thread of its own, as in production."""
    tracing.check_installed()
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Encoder(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            encode_spans(spans).SerializeToString()
            return SpanExportResult.SUCCESS

    # Ten times as often as by default, so that nearly all of them are encoded while they are being made.
    return BatchSpanProcessor(Encoder(), schedule_delay_millis=500)


if __name__ == "__main__":
    run(observe)
