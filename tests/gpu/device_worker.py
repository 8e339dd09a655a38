"""The life of an expert worker process on a GPU, whose routers may step through device memory."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cluster.placement.placement import Placement
from workers.checkpoint import Checkpoint
from workers.shard import load_shard
from workers.transport.device.acceptor import DeviceAcceptor
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer


def serve(pipe: Connection, directory: Path, name: str, placement: Placement, credentials: Credentials) -> None:
    """Says its address, and serves until it is killed."""
    torch.cuda.set_device(0)
    source = Checkpoint(directory, torch.device("cuda", 0))
    shard = load_shard(source, placement.shard(name), torch.bfloat16)
    steps = DeviceServer(shard, 1.0)
    server = ExpertServer(
        shard,
        name,
        "127.0.0.1",
        model=source.fingerprint(torch.bfloat16),
        credentials=credentials,
        ways=(lambda batcher: DeviceAcceptor(steps, StreamRows()),),
    )
    server.start()
    pipe.send(server.address)
    pipe.recv()
