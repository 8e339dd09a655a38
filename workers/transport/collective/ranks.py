"""Process groups of torch.distributed, each built directly on a store prefix of its own: over gloo, and over NCCL."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from enum import IntEnum
from importlib import import_module
from typing import Any

import torch

from workers.transport.collective.group import Group

c10d: Any = import_module("torch._C._distributed_c10d")  # its stubs lack what is used here

FOREVER_S = 10 * 365 * 86400.0
_AT_ONCE_S = 0.001


class Lane(IntEnum):
    """What a message is. The messages of one lane between two ranks arrive in the order they were sent."""

    REQUEST = 0
    REPLY = 1
    BEAT = 2
    NOTHING = 3  # carries no message, ever


def connect_store(address: str, timeout_s: float) -> Any:
    """A client of the store at `address`, for one user at a time: while it waits for a key nothing else gets through.

    Raises RuntimeError when the store cannot be reached within `timeout_s`.
    """
    host, port = address.rsplit(":", 1)
    timeout = timedelta(seconds=timeout_s)
    return c10d.TCPStore(host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=timeout)


def row_groups(device: torch.device, group: Group, rank: int, store: Any) -> dict[Lane, Any]:
    """Process groups for rows in device memory: over NCCL, one for each direction; none on a CPU, where gloo has them.

    NCCL runs what two ranks send each other in order, so that in one group a reply would wait for a request behind it.
    """
    if device.type != "cuda":
        return {}
    size = len(group.members)
    return {
        lane: _nccl(device, store, f"{group.number}-{lane.name}", rank, size) for lane in (Lane.REQUEST, Lane.REPLY)
    }


def step_group(
    device: torch.device, store: Any, name: str, rank: int, size: int, interface: Any, timeout_s: float
) -> Any:
    """The process group of a `StepGroup`: over NCCL where `device` is a GPU, else over gloo."""
    if device.type == "cuda":
        return _nccl(device, store, name, rank, size)
    return gloo_group(store, name, rank, size, interface, timeout_s)


def _nccl(device: torch.device, store: Any, name: str, rank: int, size: int) -> Any:
    # Who is lost is for the mesh to find out; NCCL's watchdog would end this process as well.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Ranks connect when they first meet, long after the store's client has another user: so one of its own.
    prefix = c10d.PrefixStore(name, store.clone())
    group = c10d.ProcessGroupNCCL(prefix, rank, size, timedelta(seconds=FOREVER_S))
    group.eager_connect_single_device(device)
    return group


class GlooGroup(c10d.ProcessGroupGloo):  # type: ignore[misc]
    """With an `abort` that ends what is under way."""

    def abort(self) -> None:
        """End every wait here, and tell all other ranks.

        gloo's own waits for what is under way and its destructor leaves waiting threads alone; but a wait that is over
        time closes every connection. One for a rank that is gone is over at once, and closes none.
        """
        for rank in range(self.size()):
            if rank != self.rank():
                with contextlib.suppress(RuntimeError):
                    nothing = torch.empty(1, dtype=torch.uint8)
                    self.recv([nothing], rank, Lane.NOTHING).wait(timedelta(seconds=_AT_ONCE_S))


def gloo_group(store: Any, name: str, rank: int, size: int, interface: Any, timeout_s: float) -> Any:
    """A process group over gloo; blocks until every rank is there. Raises RuntimeError."""
    options = c10d.ProcessGroupGloo._Options()
    options._devices, options._threads, options._timeout = [interface], 1, timedelta(seconds=timeout_s)
    return GlooGroup(c10d.PrefixStore(name, store), rank, size, options)


def gloo_interface(host: str) -> Any:
    """What the connections of any number of meshes run over, bound to the interface of `host`.

    Raises RuntimeError when `host` is not an address of this machine.
    """
    return c10d.ProcessGroupGloo.create_device(hostname=host)
