"""The life of an expert worker process that steps through device memory; or through host memory, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from tests.contract.model import Model
from workers.shard import ExpertShard
from workers.transport.base import Declined
from workers.transport.batcher import Batcher
from workers.transport.device.acceptor import AcceptedBoth, DeviceAcceptor
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows

LIMIT_S = 1.0


def serve(pipe: Connection, model: Model, experts: Sequence[tuple[int, int]], device: str) -> None:
    """Answers offers for ever: the worker's text, or why it declined. "leave" and a number ends a router's; "computed"
    asks for the pairs and nanoseconds of all steps."""
    torch.set_num_threads(1)
    shard = ExpertShard(model.spec(), device)
    for layer, expert in experts:
        shard.load(layer, expert, model.weights(layer, expert))
    batcher = Batcher(shard)
    acceptor = DeviceAcceptor(DeviceServer(shard, LIMIT_S, batcher.stepped), StreamRows())
    taken: list[AcceptedBoth] = []
    while True:
        what, text = pipe.recv()
        if what == "leave":
            taken[text].close()
            continue
        if what == "computed":
            pipe.send((batcher.rows, batcher.compute_seconds))
            continue
        try:
            accepted = acceptor.accept(text, "router", print)
        except Declined as error:
            pipe.send(("declined", str(error)))
            continue
        pipe.send(("accepted", accepted.text))
        accepted.start()
        taken.append(accepted)
