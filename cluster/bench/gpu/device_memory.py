"""A captured decoding step whose experts are in other processes of the same GPU, through device memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.bench.gpu.exchange import CONTEXT, batch_of, compare
from cluster.bench.gpu.workers import LIMIT_S, Workers
from workers.model.decode_graphs import DecodeGraphs
from workers.model.decoder import Decoder
from workers.transport.base import Tag
from workers.transport.device.offer import Shape
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay


def through_device_memory(here: Decoder, away: Workers, n_rows: int) -> dict[str, Any]:
    """Captured steps: with the experts in this process, and with those of the workers."""
    spec, names = here.spec, away.placement.workers
    shape = Shape(spec.n_layers, spec.n_experts, spec.top_k, spec.hidden_size, spec.dtype, n_rows)
    device = torch.device("cuda", 0)
    way = DeviceWay(shape, device, LIMIT_S, StreamRows())
    owner_LE = np.array(
        [[next(iter(replicas)) for replicas in layer] for layer in away.placement.replicas], dtype=np.int32
    )
    one, apart = DecodeGraphs(here, n_rows, CONTEXT), DecodeGraphs(here, n_rows, CONTEXT)
    with away.reached("router-1", device, spec.dtype, (way,)):
        one.capture(n_rows)
        apart.capture(n_rows, experts=way.experts)
        while not way.ready(names, owner_LE):
            time.sleep(0.01)
        batch = batch_of(n_rows, spec.vocab_size)

        def through(number: int) -> Tensor:
            if not way.begin_step(n_rows, Tag(0, 0, 0, number, 0, 0), LIMIT_S):
                raise RuntimeError("the workers do not answer")
            logits = apart.run(batch, range(n_rows))
            torch.cuda.synchronize()
            if way.end_step() is None:
                raise RuntimeError("the step is void")
            return logits

        return compare(spec.n_layers, {"here": lambda _: one.run(batch, range(n_rows)), "away": through})
