"""The life of an expert worker process that steps through device memory; or through host memory, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from tests.contract.model import Model
from workers.shard import ExpertShard
from workers.transport.base import Declined
from workers.transport.device.acceptor import AcceptedBoth, DeviceAcceptor
from workers.transport.device.server import DeviceServer

LIMIT_S = 1.0


class NoRows:
    """A way for the rows of other steps, which these tests have none of."""

    name, text = "none", ""

    def offer(self, worker: str) -> NoRows:
        return self

    def accept(self, offer: str, router: str, end: object) -> NoRows:
        return self

    def accepted(self, text: str) -> NoRows:
        return self

    def start(self) -> None:
        pass

    def send(self, rows: object) -> bool:
        return False

    def close(self) -> None:
        pass


def serve(pipe: Connection, model: Model, experts: Sequence[tuple[int, int]], device: str) -> None:
    """Answers offers for ever: the worker's text, or why it declined. "leave" and a number ends a router's."""
    torch.set_num_threads(1)
    shard = ExpertShard(model.spec(), device)
    for layer, expert in experts:
        shard.load(layer, expert, model.weights(layer, expert))
    acceptor = DeviceAcceptor(DeviceServer(shard, LIMIT_S), NoRows())
    taken: list[AcceptedBoth] = []
    while True:
        what, text = pipe.recv()
        if what == "leave":
            taken[text].close()
            continue
        try:
            accepted = acceptor.accept(text, "router", print)
        except Declined as error:
            pipe.send(("declined", str(error)))
            continue
        pipe.send(("accepted", accepted.text))
        accepted.start()
        taken.append(accepted)
