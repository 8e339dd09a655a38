"""One process group between routers and expert workers: messages of raw bytes, until it breaks or is left.

A router and the workers it chose for a layer exchange blocks as an all-to-all with uneven splits would, but pair by
pair: a pair without rows sends nothing, and a router that rests holds nobody up. gloo's own all-to-all hands every
call to a helper thread, sends between all ranks, also nothing, and takes four times as long and more.

Whatever goes wrong with one rank ends the group for all: nobody goes on without a rank that may be dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from workers.transport.collective import ranks
from workers.transport.collective.group import Group
from workers.transport.collective.ranks import FOREVER_S, Lane
from workers.transport.collective.step_group import StepGroup

_AT_ONCE_S = 0.001
_ABORT_S = 1.0
_SPINS, _NAP_S = 2000, 0.00005  # looks at a GPU's event before the thread sleeps between them
# What gloo tells the other threads when the time of one's wait is over; that one knows for whom it waited.
_SECOND_HAND, _HEARSAY_S = "Application timeout", 0.2


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
        steps: bool = False,
    ) -> None:
        """Blocks until every rank is there. Raises RuntimeError when one is not within `timeout_s`.

        store, interface: what `connect_store` and `gloo_interface` gave; the store is free again afterwards.
        device: where the rows of all ranks are. on_break: called once, by a thread of the mesh, unless it is closed
        first. steps: whether whole steps go over it too; all ranks say the same.
        """
        self.group = group
        self.rank = rank
        self.device = device
        self.broken: str | None = None
        self.ended = threading.Event()
        self._on_break = on_break
        self._lock = threading.Lock()
        self._gloo: Any = ranks.gloo_group(store, str(group.number), rank, len(group.members), interface, timeout_s)
        self._rows: dict[Lane, Any] = {}
        #: By router: what its whole steps go over. A router has its own alone.
        self.steps: dict[int, StepGroup] = {}
        try:
            self._rows = ranks.row_groups(device, group, rank, store)
            if self._rows:
                self._connect_rows()
            if steps:
                self._build_steps(store, interface, timeout_s)
        except BaseException:
            self._tear_down()
            raise

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
        return self._start(lambda gloo: self._in_order(self._rows.get(lane, gloo).send([rows], rank, lane)))

    def receive_rows(self, rank: int, lane: Lane, rows: Tensor) -> Any:
        """As `receive`, for the uint8 rows of a message, of exactly this size, in device memory."""
        return self._start(lambda gloo: self._in_order(self._rows.get(lane, gloo).recv([rows], rank, lane)))

    def wait(self, work: Any, timeout_s: float = FOREVER_S) -> None:
        """Return when `work` is done. Raises Broken when it never will be; lateness ends every work of the mesh."""
        try:
            work.wait(timedelta(seconds=max(timeout_s, _AT_ONCE_S)))
        except RuntimeError as error:
            if _SECOND_HAND in str(error):
                self.ended.wait(_HEARSAY_S)
            raise Broken(self.broken or _plain(error)) from None

    def wait_for_stream(self, timeout_s: float) -> None:
        """Return when what this thread has launched on a GPU is done. Raises Broken, as `wait`."""
        if self.device.type != "cuda":
            return
        try:
            _InOrder(self, None).wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise Broken(self.broken or str(error)) from None

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
        gloo, self._gloo = self._gloo, None
        # NCCL's abort lets go of its kernels first, and may then wait until the graphs that hold some are gone.
        groups = (gloo, *self._rows.values(), *(each.ranks for each in self.steps.values()))
        aborts = [threading.Thread(target=group.abort, name="group-abort", daemon=True) for group in groups]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join(_ABORT_S)

    def _in_order(self, work: Any) -> Any:
        return _InOrder(self, work) if self.device.type == "cuda" else work

    def _connect_rows(self) -> None:
        """One byte each way between all pairs that will exchange rows: two ranks of NCCL connect when they first meet,
        which takes them seconds."""
        for router in self.routers:
            for worker in self.workers:
                for lane, source, target in ((Lane.REQUEST, router, worker), (Lane.REPLY, worker, router)):
                    byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
                    if self.rank == source:
                        self.wait(self.send_rows(target, lane, byte))
                    elif self.rank == target:
                        self.wait(self.receive_rows(source, lane, byte))

    def _build_steps(self, store: Any, interface: Any, timeout_s: float) -> None:
        """In the order of the routers, everywhere: who waits for somebody else's group waits for one that is built."""
        for router in self.routers:
            if self.rank in (router, *self.workers):
                rank = 0 if self.rank == router else 1 + self.rank - self.workers.start
                name = f"{self.group.number}-steps-{router}"
                size = 1 + len(self.workers)
                group = ranks.step_group(self.device, store, name, rank, size, interface, timeout_s)
                self.steps[router] = StepGroup(group, rank, size, self.device)


class _InOrder:
    """Work of NCCL, waited for in the order of the stream: a wait of NCCL's with a time limit takes a millisecond."""

    def __init__(self, mesh: Mesh, work: Any) -> None:
        """work: None for whatever the stream has."""
        self._mesh, self._work = mesh, work

    def wait(self, timeout: timedelta) -> None:
        """Raises RuntimeError when it is not done in time, or the mesh breaks."""
        if self._work is not None:
            self._work.wait()  # the stream does
        done = torch.cuda.current_stream(self._mesh.device).record_event()
        end, looks = time.monotonic() + timeout.total_seconds(), 0
        while not done.query():
            if self._mesh.broken is not None:
                raise RuntimeError(self._mesh.broken)
            if time.monotonic() > end:
                raise RuntimeError(f"not done on the GPU after {timeout.total_seconds():g} s")
            looks += 1
            if looks > _SPINS:
                time.sleep(_NAP_S)


def _plain(error: RuntimeError) -> str:
    """gloo's words without the line of its source and the advice."""
    text = str(error).split(". This is", 1)[0]
    return text.rsplit("cc:", 1)[-1].split("] ", 1)[-1].strip()
