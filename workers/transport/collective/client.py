"""The router's side of the collective transport: rows to the workers of its group, driven by the step loop's thread."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers import wire
from workers.errors import GroupLost, WireError, WorkerLost
from workers.transport.base import Received, Rows, Tag
from workers.transport.collective.blocks import ERROR_BYTES, LEAVE, Buffers, as_bytes, fill, fits, view
from workers.transport.collective.group import Group
from workers.transport.collective.joiner import BUILD_S, Joiner, listen
from workers.transport.collective.mesh import Broken, Mesh
from workers.transport.collective.ranks import Lane

_LAST_REPLIES_S = 30.0  # how long a group that was followed by another waits for replies that may be given up


class _Owed(NamedTuple):
    """A request in flight, with the blocks that it uses."""

    mesh: Mesh
    rank: int
    tag: Tag
    reply: Any
    reply_block: Tensor
    reply_bytes: int
    sent: tuple[Any, ...]
    block: Tensor


class CollectiveTransport:
    """A `Transport` over the group that the process is in. A worker can be reached while it is in that group too.

    A new group is built beside the one in use, and requests go over it once every worker of it has given a sign of
    life; what is in flight comes back over the old one. A group that breaks loses everything in flight, and until the
    next one is there every worker is lost.
    """

    def __init__(
        self,
        router: str,
        host: str,
        *,
        deadline_s: float = 2.0,
        device: torch.device | str = "cpu",
        steps: bool = False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Connections are bound to the interface of `host`. A worker without a sign of life for `deadline_s` is lost.

        device: where the rows are, here and at the workers: on CUDA devices they travel over NCCL. steps: whether whole
        steps go over its groups too (`CollectiveSteps`), as the workers say.

        on_change: called by some thread when a group became ready or broke. Raises RuntimeError when `host` is not an
        address of this machine.
        """
        self.dropped_replies = 0
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._mesh: Mesh | None = None
        self._left_at: dict[Mesh, float] = {}  # groups that were followed by another
        self._in_flight: dict[Mesh, int] = {}
        self._connected: set[str] = set()
        self._owed: defaultdict[str, deque[_Owed]] = defaultdict(deque)
        self._buffers = Buffers()
        self._joiner = Joiner(router, host, torch.device(device), self._live, on_change, steps)

    @property
    def ready(self) -> int:
        """Number of the group in use; 0: there is none, or it broke."""
        mesh = self._mesh
        return 0 if mesh is None or mesh.broken is not None else mesh.group.number

    @property
    def broken(self) -> int:
        """Number of the newest group that broke or could not be built; 0: none did."""
        return self._joiner.broken

    def join(self, group: Group | None) -> None:
        """Take part in `group` as soon as it is built. From any thread; returns at once, and may be repeated."""
        self._joiner.join(group)

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`. The group says where it is, so the address means nothing."""
        self._connected.add(worker)
        kept = [owed for owed in self._owed[worker] if owed.mesh.broken is None]
        self._owed[worker] = deque(kept)

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""
        self._connected.discard(worker)

    def way(self, worker: str) -> str:
        """The group of all routers and workers."""
        return "collective"

    def answers(self, worker: str) -> bool:
        """Whether `worker` is in a group that works."""
        mesh = self._mesh
        return mesh is not None and mesh.broken is None and worker in mesh.group.workers

    @property
    def unreachable(self) -> Mapping[str, str]:
        """None: whoever does not answer one of a group has left it for all."""
        return {}

    def room(self, worker: str, n_bytes: int) -> None:
        """Anywhere: requests are copied to where the group sends from."""

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows` and return at once. Raises WorkerLost when the worker is not in a group that works."""
        mesh, rank = self._way(worker)
        try:
            owed = self._post(mesh, rank, rows)
        except Broken as broken:
            self._count(mesh, -1)
            raise _loss(mesh, worker, broken) from None
        self._owed[worker].append(owed)

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """Write the reply to the rows sent with `tag` into `out_PD`; see `Transport.receive`."""
        deadline = time.monotonic() + timeout_s
        queue = self._owed[worker]
        while queue and worker in self._connected:
            owed = queue.popleft()
            try:
                result = self._finish(owed, deadline, out_PD if owed.tag == tag else None)
            except (Broken, WireError) as error:
                loss = _loss(owed.mesh, worker, error)
                if owed.tag == tag:
                    raise loss from None
                continue
            finally:
                self._count(owed.mesh, -1)
            if owed.tag != tag:
                self.dropped_replies += 1
            elif isinstance(result, str):
                raise WorkerLost(worker, f"refused the rows: {result}")
            else:
                return Received(out_PD, result)
        raise WorkerLost(worker, f"nothing was sent with {tag}" if worker in self._connected else "not connected")

    def rests(self) -> Mesh | None:
        """The group in use, if it works and nothing is in flight over it."""
        mesh = self._mesh
        return None if mesh is None or mesh.broken is not None or self._in_flight.get(mesh) else mesh

    def begin(self, mesh: Mesh) -> bool:
        """A step over `mesh` is in flight from now on; False: the group in use is another."""
        with self._lock:
            if mesh is not self._mesh or mesh not in self._in_flight or mesh.broken is not None:
                return False
            self._in_flight[mesh] += 1
            return True

    def end(self, mesh: Mesh) -> None:
        """It is not any more."""
        self._count(mesh, -1)

    def close(self) -> None:
        """Leave every group, so that its workers do not count this router as lost."""
        mesh = self._mesh
        if mesh is not None and mesh.broken is None:
            with self._lock:
                self._left_at[mesh] = 0  # long ago: nothing that is in flight is awaited any more
            mesh.ended.wait(self._deadline_s)
        self._joiner.close()

    def _way(self, worker: str) -> tuple[Mesh, int]:
        with self._lock:
            mesh = self._mesh
            if mesh is None or mesh.broken is not None:
                raise GroupLost(worker, "there is no group yet" if mesh is None else f"its group broke: {mesh.broken}")
            if worker not in mesh.group.workers or worker not in self._connected:
                raise WorkerLost(worker, f"not in group {mesh.group.number}, or not connected")
            self._in_flight[mesh] += 1
        return mesh, mesh.workers[mesh.group.workers.index(worker)]

    def _post(self, mesh: Mesh, rank: int, rows: Rows) -> _Owed:
        reply_bytes = rows.n_pairs * rows.row_bytes
        # The reply finds its place before it comes: so it need not wait for it.
        in_one = fits(reply_bytes) and not mesh.rows_apart
        room = max(wire.HEADER_BYTES + reply_bytes, ERROR_BYTES) if in_one else ERROR_BYTES
        reply_block = self._buffers.take(room)
        reply = mesh.receive(rank, Lane.REPLY, reply_block)
        block, sent = self._send_request(mesh, rank, rows)
        return _Owed(mesh, rank, rows.tag, reply, reply_block, reply_bytes, sent, block)

    def _send_request(self, mesh: Mesh, rank: int, rows: Rows) -> tuple[Tensor, tuple[Any, ...]]:
        """The block that the request, or its head, is in, and what is under way."""
        if rows.message is not None and not mesh.rows_apart:
            block = self._buffers.take(len(rows.message))
            return block, (mesh.send(rank, Lane.REQUEST, fill(block, rows.message)),)
        x_TD, token_P, expert_P = rows.request
        x_TD = x_TD if mesh.rows_apart else x_TD.cpu()
        head, payload_bytes = wire.request_head(rows.tag, x_TD, rows.n_pairs)
        block = self._buffers.take(len(head) + payload_bytes if fits(payload_bytes) else len(head))
        if fits(payload_bytes) and not mesh.rows_apart:
            message = fill(block, head, x_TD, token_P, expert_P)
            return block, (mesh.send(rank, Lane.REQUEST, message),)
        pairs = torch.cat((token_P, expert_P))
        return block, (
            mesh.send(rank, Lane.REQUEST, fill(block, head)),
            mesh.send_rows(rank, Lane.REQUEST, as_bytes(x_TD)),
            mesh.send(rank, Lane.REQUEST, as_bytes(pairs)),
        )

    def _finish(self, owed: _Owed, deadline: float, out_PD: Tensor | None) -> int | str:
        """Wait for a reply and write its rows into `out_PD`, or nowhere.

        The nanoseconds the worker computed; or why it refused the rows.
        """
        mesh = owed.mesh
        mesh.wait(owed.reply, deadline - time.monotonic())
        header = wire.parse_head(view(owed.reply_block))
        if header.tag != owed.tag:
            raise WireError(f"the reply to {header.tag} where that to {owed.tag} was due")
        result: int | str = header.compute_ns
        if header.kind == wire.ERROR:
            result = bytes(view(owed.reply_block)[wire.HEADER_BYTES :][: header.payload_bytes]).decode(errors="replace")
        else:
            self._take_rows(owed, header, deadline, out_PD)
        for work in owed.sent:
            mesh.wait(work, deadline - time.monotonic())
        self._buffers.give(owed.reply_block)
        self._buffers.give(owed.block)
        return result

    def _take_rows(self, owed: _Owed, header: wire.Header, deadline: float, out_PD: Tensor | None) -> None:
        if header.kind != wire.REPLY or header.payload_bytes != owed.reply_bytes:
            raise WireError(f"a reply of {header.payload_bytes} bytes, awaited: {owed.reply_bytes}")
        if out_PD is not None and (header.n_pairs, header.width, header.dtype) != (*out_PD.shape, out_PD.dtype):
            raise WireError(f"{header.n_pairs} rows of {header.width} {header.dtype}, awaited: {tuple(out_PD.shape)}")
        if fits(owed.reply_bytes) and not owed.mesh.rows_apart:
            rows = owed.reply_block[wire.HEADER_BYTES :][: owed.reply_bytes]
        else:
            here = owed.mesh.device if owed.mesh.rows_apart else torch.device("cpu")
            is_place = out_PD is not None and out_PD.device.type == here.type
            if out_PD is not None and is_place:
                rows = as_bytes(out_PD)
            else:
                rows = torch.empty(owed.reply_bytes, dtype=torch.uint8, device=here)
            # The host waits: whether the rows came must be known before the next layer is sent, as its counts must.
            coming = owed.mesh.receive_rows(owed.rank, Lane.REPLY, rows)
            owed.mesh.wait(coming, deadline - time.monotonic())
            if is_place:
                return
        if out_PD is not None:
            out_PD.copy_(rows.view(out_PD.dtype).view(out_PD.shape))

    def _count(self, mesh: Mesh, requests: int) -> None:
        with self._lock:
            if mesh in self._in_flight:
                self._in_flight[mesh] += requests

    def _live(self, mesh: Mesh) -> None:
        """The life of a group, in a thread of its own: it is taken up once all workers beat, and left for the next."""
        taken_up = False
        with self._lock:
            self._in_flight[mesh] = 0
        try:
            for _ in listen(mesh, BUILD_S, self._deadline_s):
                if not taken_up:
                    taken_up = True
                    self._take_up(mesh)
                if self._is_done(mesh):
                    break
            _leave(mesh, self._deadline_s)
        except Broken as broken:
            mesh.fail(str(broken))
        finally:
            with self._lock:
                self._left_at.pop(mesh, None)
                del self._in_flight[mesh]

    def _take_up(self, mesh: Mesh) -> None:
        with self._lock:
            old = self._mesh
            is_newer = old is None or old.broken is not None or old.group.number < mesh.group.number
            if is_newer:
                self._mesh = mesh
            followed = old if is_newer else mesh
            if followed in self._in_flight:
                self._left_at[followed] = time.monotonic()
        self._joiner.changed()

    def _is_done(self, mesh: Mesh) -> bool:
        with self._lock:
            left_at = self._left_at.get(mesh)
            return left_at is not None and (not self._in_flight[mesh] or time.monotonic() > left_at + _LAST_REPLIES_S)


def _loss(mesh: Mesh, worker: str, error: Exception) -> WorkerLost:
    """End the group because of `worker`, unless another one was the first to go."""
    if mesh.broken is not None:
        return GroupLost(worker, str(error))
    mesh.fail(f"{worker}: {error}")
    return WorkerLost(worker, str(error))


def _leave(mesh: Mesh, timeout_s: float) -> None:
    """Tell the workers that this router is not lost but has left, and wait until they know."""
    word = torch.frombuffer(bytearray(LEAVE), dtype=torch.uint8)
    echoes = [mesh.receive(worker, Lane.REPLY, torch.empty_like(word)) for worker in mesh.workers]
    words = [mesh.send(worker, Lane.REQUEST, word) for worker in mesh.workers]
    for work in words + echoes:
        mesh.wait(work, timeout_s)
