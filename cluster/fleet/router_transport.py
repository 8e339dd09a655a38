"""How a router reaches its expert workers: the transport that the configuration names, and faster ways beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from cluster.config import Config
from cluster.router.exchange.captured_steps import StepWay
from workers.checkpoint import Checkpoint
from workers.device import compute_dtype, rows_device
from workers.errors import DeviceError
from workers.kernels.select import ops_for
from workers.transport.base import FastWay, Transport
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import host_store
from workers.transport.collective.interface import bind_address
from workers.transport.collective.steps import CollectiveSteps
from workers.transport.device.offer import Shape
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import STEP_LIMIT_S, DeviceWay
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.shm.memory import NotShared
from workers.transport.shm.router import ShmWay
from workers.transport.shm.steps import RingSteps

log = logging.getLogger(__name__)


class Reach(NamedTuple):
    """A router's way to the expert workers."""

    transport: Transport
    step_way: StepWay | None  # of captured decoding steps
    rows_on: str = "cpu"  # whose memory the transport takes rows from
    collective: CollectiveTransport | None = None  # the transport, where it is that
    store: object = None  # of the groups whose first router this one is; lives as long as the process
    store_address: str = ""


class Shell(NamedTuple):
    """What a router's process is asked and told on the way."""

    router: str
    host: str
    credentials: Credentials
    epoch: Callable[[], int]
    tell: Callable[[], None]  # the controller, that something changed
    on_group: Callable[[], None]  # a group became ready or broke; from any thread


def reach(config: Config, source: Checkpoint, shell: Shell) -> Reach:
    """The way to the workers of the model `source`, read to this router's device.

    Raises ExpertMeshError where the collective transport may not be used.
    """
    dtype = compute_dtype(config.dtype, source.spec.dtype, source.device, config.expert_device)
    if config.transport == "collective":
        return _collective(config, source, dtype, shell)
    step_way, ways = _ways(config, source, dtype)
    transport = GrpcTransport(
        shell.router, source.fingerprint(dtype), shell.credentials, epoch=shell.epoch, ways=ways, on_reach=shell.tell
    )
    return Reach(transport, step_way)


def _collective(config: Config, source: Checkpoint, dtype: torch.dtype, shell: Shell) -> Reach:
    host = bind_address(config.collective_interface, config.trusted_network, shell.host)
    store, address = host_store(host)
    device, spec = rows_device(source.device, config.router_device, config.expert_device), source.spec
    captures = device.type == "cuda" and ops_for(device, dtype).exact_rows
    transport = CollectiveTransport(
        shell.router,
        host,
        deadline_s=config.collective_deadline_s,
        device=device,
        steps=captures,
        on_change=shell.on_group,
    )
    steps = None
    if captures:
        from workers.model.decode_graphs import size_of  # needs Triton, which is there where a GPU is

        steps = CollectiveSteps(
            transport, spec.n_layers, spec.n_experts, spec.top_k, spec.hidden_size, dtype,
            limit_s=config.reply_timeout_s, size_of=size_of,
        )  # fmt: skip
    return Reach(transport, steps, device.type, transport, store, address)


def _ways(config: Config, source: Checkpoint, dtype: torch.dtype) -> tuple[StepWay | None, tuple[FastWay, ...]]:
    """What captured steps take, and what all rows do where both ends can."""
    if config.transport == "shm":
        return _ring_steps(source, dtype)
    way = _device_way(config, source, dtype)
    return way, () if way is None else (way,)


def _ring_steps(source: Checkpoint, dtype: torch.dtype) -> tuple[StepWay | None, tuple[FastWay, ...]]:
    from workers.kernels.cpu.ops import CpuOps

    way, spec = ShmWay(), source.spec
    if not isinstance(ops_for(source.device, dtype), CpuOps):
        return None, (way,)
    return RingSteps(way, spec.n_layers, spec.n_experts), (way,)


def _device_way(config: Config, source: Checkpoint, dtype: torch.dtype) -> DeviceWay | None:
    """Through device memory, where routers and workers are on GPUs and rows may take that way."""
    spec = source.spec
    on_gpus = source.device.type == "cuda" and config.expert_device == "cuda"
    if config.transport != "device" or not on_gpus or not ops_for(source.device, dtype).exact_rows:
        return None
    from workers.model.decode_graphs import size_of

    shape = Shape(spec.n_layers, spec.n_experts, spec.top_k, spec.hidden_size, dtype, size_of(config.max_sequences))
    try:
        return DeviceWay(shape, source.device, STEP_LIMIT_S, StreamRows())
    except (DeviceError, NotShared) as error:
        log.warning("rows do not travel through device memory: %s", error)
        return None
