"""One process group between routers and expert workers: messages of raw bytes, until it breaks or is left.

A router and the workers it chose for a layer exchange blocks as an all-to-all with uneven splits would, but pair by
pair: a pair without rows sends nothing, and a router that rests holds nobody up. gloo's own all-to-all hands every
call to a helper thread, sends between all ranks, also nothing, and takes four times as long and more.

Whatever goes wrong with one rank ends the group for all: nobody goes on without a rank that may be dead.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from workers.transport.collective.group import Group

c10d: Any = import_module("torch._C._distributed_c10d")  # its stubs lack what is used here

_FOREVER_S = 10 * 365 * 86400.0
_AT_ONCE_S = 0.001
# What gloo tells the other threads when the time of one's wait is over; that one knows for whom it waited.
_SECOND_HAND, _HEARSAY_S = "Application timeout", 0.2


class Lane(IntEnum):
    """What a message is. The messages of one lane between two ranks arrive in the order they were sent."""

    REQUEST = 0
    REPLY = 1
    BEAT = 2
    NOTHING = 3  # carries no message, ever


class Broken(Exception):
    """A message will not come, or not go. The text says why."""


class Mesh:
    """A process group that has been built. Any thread may send, receive and wait."""

    def __init__(
        self,
        group: Group,
        rank: int,
        store: Any,
        interface: Any,
        device: torch.device,
        timeout_s: float,
        on_break: Callable[[Mesh], None],
    ) -> None:
        """Blocks until every rank is there. Raises RuntimeError when one is not within `timeout_s`.

        store, interface: what `connect_store` and `gloo_interface` gave; the store is free again afterwards.
        device: where the rows of all ranks are. on_break: called once, by a thread of the mesh, unless it is closed
        first.
        """
        self.group = group
        self.rank = rank
        self.device = device
        self.broken: str | None = None
        self.ended = threading.Event()
        self._on_break = on_break
        self._lock = threading.Lock()
        options = c10d.ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [interface], 1, timedelta(seconds=timeout_s)
        prefix = c10d.PrefixStore(str(group.number), store)
        self._gloo: Any = c10d.ProcessGroupGloo(prefix, rank, len(group.members), options)
        self._rows: dict[Lane, Any] = row_groups(device, group, rank, store)

    @property
    def routers(self) -> range:
        """The ranks of the routers."""
        return range(len(self.group.routers))

    @property
    def workers(self) -> range:
        """The ranks of the expert workers."""
        return range(len(self.group.routers), len(self.group.members))

    def name(self, rank: int) -> str:
        """Whose rank it is."""
        return self.group.members[rank]

    def send(self, rank: int, lane: Lane, block: Tensor) -> Any:
        """Start sending uint8 `block`, which must not change until the work that is returned is done.

        It is done once it is on its way; for that `rank` must have asked for it.
        """
        return self._start(lambda gloo: gloo.send([block], rank, lane))

    def receive(self, rank: int, lane: Lane, block: Tensor) -> Any:
        """Start receiving into uint8 `block`: the next message of `lane`, which may be shorter but not longer."""
        return self._start(lambda gloo: gloo.recv([block], rank, lane))

    @property
    def rows_apart(self) -> bool:
        """Whether rows travel apart from their header, from device memory to device memory."""
        return bool(self._rows)

    def send_rows(self, rank: int, lane: Lane, rows: Tensor) -> Any:
        """As `send`, for the uint8 rows of a message, in device memory."""
        return self._start(lambda gloo: self._rows.get(lane, gloo).send([rows], rank, lane))

    def receive_rows(self, rank: int, lane: Lane, rows: Tensor) -> Any:
        """As `receive`, for the uint8 rows of a message, of exactly this size, in device memory."""
        return self._start(lambda gloo: self._rows.get(lane, gloo).recv([rows], rank, lane))

    def wait(self, work: Any, timeout_s: float = _FOREVER_S) -> None:
        """Return when `work` is done. Raises Broken when it never will be; lateness ends every work of the mesh."""
        try:
            work.wait(timedelta(seconds=max(timeout_s, _AT_ONCE_S)))
        except RuntimeError as error:
            if _SECOND_HAND in str(error):
                self.ended.wait(_HEARSAY_S)
            raise Broken(self.broken or _plain(error)) from None

    def fail(self, reason: str) -> None:
        """End the group for all ranks because of `reason`. Returns at once."""
        if self._end(reason):
            threading.Thread(target=self._fail, name="mesh-broken", daemon=True).start()

    def close(self) -> None:
        """End this rank's part; for who is left in the group it is lost."""
        if self._end("closed"):
            self._tear_down()

    def _start(self, operation: Callable[[Any], Any]) -> Any:
        gloo = self._gloo
        if gloo is None:
            raise Broken(self.broken)
        try:
            return operation(gloo)
        except RuntimeError as error:
            raise Broken(self.broken or _plain(error)) from None

    def _end(self, reason: str) -> bool:
        with self._lock:
            is_first = self.broken is None
            self.broken = self.broken or reason
        self.ended.set()
        return is_first

    def _fail(self) -> None:
        self._tear_down()
        self._on_break(self)

    def _tear_down(self) -> None:
        # gloo's abort waits for what is under way and its destructor leaves waiting threads alone; but a wait that is
        # over time closes every connection, which ends the waits of all threads here and tells all other ranks.
        nobody = (self.rank + 1) % len(self.group.members)
        gloo, self._gloo = self._gloo, None
        with contextlib.suppress(RuntimeError):
            gloo.recv([torch.empty(1, dtype=torch.uint8)], nobody, Lane.NOTHING).wait(timedelta(seconds=_AT_ONCE_S))
        for rows in self._rows.values():
            rows.abort()


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
    # Who is lost is for the mesh to find out; NCCL's watchdog would end this process as well.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(device)
    groups = {}
    for lane in (Lane.REQUEST, Lane.REPLY):
        # Two ranks connect when they first meet, long after the store's client has another user: so one of its own.
        prefix = c10d.PrefixStore(f"{group.number}-{lane.name}", store.clone())
        groups[lane] = c10d.ProcessGroupNCCL(prefix, rank, len(group.members), timedelta(seconds=_FOREVER_S))
    return groups


def gloo_interface(host: str) -> Any:
    """What the connections of any number of meshes run over, bound to the interface of `host`.

    Raises RuntimeError when `host` is not an address of this machine.
    """
    return c10d.ProcessGroupGloo.create_device(hostname=host)


def _plain(error: RuntimeError) -> str:
    """gloo's words without the line of its source and the advice."""
    text = str(error).split(". This is", 1)[0]
    return text.rsplit("cc:", 1)[-1].split("] ", 1)[-1].strip()
