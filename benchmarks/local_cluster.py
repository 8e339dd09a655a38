"""Expert workers in processes of their own on this machine, and the exchange with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.expert_process import placement_of, worker_names
from cluster.config import Config
from cluster.errors import StartError
from cluster.router.exchange.exchange import Exchange
from workers.checkpoint import Checkpoint
from workers.kernels.threads import process_environment
from workers.transport.base import FastWay
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.shm.router import ShmWay
from workers.transport.shm.steps import RingSteps


@contextmanager
def local_cluster(
    directory: Path,
    n_workers: int,
    threads: int,
    ways: Sequence[FastWay],
    metrics_urls: list[str] | None = None,
    n_homes: int = 1,
) -> Iterator[Exchange]:
    """An exchange with `n_workers` processes of `threads` threads each, over gRPC or a faster way of `ways`. They end
    with the context. `metrics_urls` gets the URLs of their metrics. `n_homes`: of each expert, all but one spare."""
    checkpoint, config, names = Checkpoint(directory), Config(), worker_names(n_workers)
    spec, credentials = checkpoint.spec, Credentials.generate()
    with ExitStack() as stack:
        file = Path(stack.enter_context(TemporaryDirectory()), "credentials.json")
        credentials.write(file)
        processes = [
            stack.enter_context(_expert_process(directory, name, n_workers, threads, file, n_homes)) for name in names
        ]
        addresses = {name: _line(process) for name, process in zip(names, processes, strict=True)}
        if metrics_urls is not None:
            metrics_urls += [_line(process) for process in processes]
        transport = GrpcTransport("router-0", checkpoint.fingerprint(torch.float32), credentials, ways=ways)
        stack.callback(transport.close)
        rings = [way for way in ways if isinstance(way, ShmWay)]
        yield Exchange(
            placement_of(spec, names, n_homes), addresses, transport,
            reply_timeout_s=config.reply_timeout_s, rejoin_timeout_s=config.rejoin_timeout_s,
            step_way=RingSteps(rings[0], spec.n_layers, spec.n_experts) if rings else None,
        )  # fmt: skip


@contextmanager
def _expert_process(
    directory: Path, name: str, n_workers: int, threads: int, credentials: Path, n_homes: int
) -> Iterator[subprocess.Popen[str]]:
    arguments = (directory, name, n_workers, threads, credentials, n_homes)
    command = [sys.executable, "-m", "benchmarks.expert_process", *map(str, arguments)]
    environment = os.environ | process_environment(threads)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _line(process: subprocess.Popen[str]) -> str:
    """The next line that it says."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise StartError(f"an expert worker ended with exit code {process.wait()}")
    return line
