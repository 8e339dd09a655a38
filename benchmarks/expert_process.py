"""One expert worker of a benchmark: a shard behind the gRPC transport, without Ray.

`python -m benchmarks.expert_process CHECKPOINT WORKER N_WORKERS THREADS CREDENTIALS`, the last a file; prints its
address once it serves, then the URL of its metrics, and ends when its standard input does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cluster.fleet.worker_readings import Loads, WorkerReadings
from cluster.observe.endpoint import Endpoint
from cluster.observe.exposition import Readings
from cluster.placement.placement import striped
from workers.checkpoint import Checkpoint
from workers.shard import load_shard
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.worker import ShmAcceptor


def main(directory: str, worker: str, n_workers: str, threads: str, credentials: str) -> None:
    torch.set_num_threads(int(threads))
    checkpoint = Checkpoint(directory)
    spec = checkpoint.spec
    placement = striped(spec.n_layers, spec.n_experts, worker_names(int(n_workers)), dense_layers=spec.dense_layers)
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


def worker_names(n: int) -> list[str]:
    """expert-0, expert-1, ..."""
    return [f"expert-{index}" for index in range(n)]


if __name__ == "__main__":
    main(*sys.argv[1:])
