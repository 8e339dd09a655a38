"""One expert worker of a benchmark: a shard behind the gRPC transport, without Ray.

`python -m benchmarks.expert_process CHECKPOINT WORKER N_WORKERS THREADS CREDENTIALS N_HOMES`, the last two a file and
how many homes each expert has; prints its address once it serves, then the URL of its metrics, and ends when its
standard input does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.fleet.worker_readings import Loads, WorkerReadings
from cluster.observe.endpoint import Endpoint
from cluster.observe.exposition import Readings
from cluster.placement.placement import Placement, striped
from cluster.placement.spares import sheltered
from workers.checkpoint import Checkpoint
from workers.shard import load_shard
from workers.spec import ModelSpec
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.worker import ShmAcceptor


def main(directory: str, worker: str, n_workers: str, threads: str, credentials: str, n_homes: str) -> None:
    torch.set_num_threads(int(threads))
    checkpoint = Checkpoint(directory)
    spec = checkpoint.spec
    placement = placement_of(spec, worker_names(int(n_workers)), int(n_homes))
    shard = load_shard(checkpoint, placement.shard(worker), torch.float32)
    server = ExpertServer(
        shard,
        worker,
        "127.0.0.1",
        model=checkpoint.fingerprint(torch.float32),
        credentials=Credentials.read(Path(credentials)),
        ways=(ShmAcceptor,),
    )
    server.start()
    readings = WorkerReadings(shard, server.batcher, Loads(), lambda: 0)
    print(server.address, Endpoint(Readings(worker, (readings,)), "127.0.0.1").url, sep="\n", flush=True)
    sys.stdin.read()
    server.stop(grace_s=1.0)


def placement_of(spec: ModelSpec, workers: Sequence[str], n_homes: int) -> Placement:
    """Experts in turn on the workers, and `n_homes` of each, of which all but the first are spare."""
    placement = striped(spec.n_layers, spec.n_experts, workers, dense_layers=spec.dense_layers)
    return sheltered(placement, (), dict.fromkeys(workers, 0), n_homes) if n_homes > 1 else placement


def worker_names(n: int) -> list[str]:
    """expert-0, expert-1, ..."""
    return [f"expert-{index}" for index in range(n)]


if __name__ == "__main__":
    main(*sys.argv[1:])
