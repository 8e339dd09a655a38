"""Expert workers in processes of their own on this machine, and the exchange with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.expert_process import worker_names
from cluster.config import Config
from cluster.errors import StartError
from cluster.placement.placement import striped
from cluster.router.exchange import Exchange
from workers.families.registry import read_spec
from workers.kernels.threads import process_environment
from workers.transport.grpc.client import GrpcTransport


@contextmanager
def local_cluster(directory: Path, n_workers: int, threads: int) -> Iterator[Exchange]:
    """An exchange with `n_workers` processes of `threads` threads each, over gRPC. They end with the context."""
    spec, config, names = read_spec(directory), Config(), worker_names(n_workers)
    with ExitStack() as stack:
        processes = [stack.enter_context(_expert_process(directory, name, n_workers, threads)) for name in names]
        addresses = {name: _address(process) for name, process in zip(names, processes, strict=True)}
        transport = GrpcTransport()
        stack.callback(transport.close)
        yield Exchange(
            striped(spec.n_layers, spec.n_experts, names, dense_layers=spec.dense_layers), addresses, transport,
            reply_timeout_s=config.reply_timeout_s, rejoin_timeout_s=config.rejoin_timeout_s,
        )  # fmt: skip


@contextmanager
def _expert_process(directory: Path, name: str, n_workers: int, threads: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.expert_process", str(directory), name, str(n_workers), str(threads)]
    environment = os.environ | process_environment(threads)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise StartError(f"an expert worker ended with exit code {process.wait()}")
    return address
