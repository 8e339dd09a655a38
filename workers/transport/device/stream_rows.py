"""The way for rows of other steps where there is no faster one: the stream itself carries them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from workers.errors import WorkerLost
from workers.transport.base import Received, Rows, Tag


class StreamRows:
    """Offered, accepted and never used: every request stays with the stream. Both ends' halves in one."""

    name, text = "stream", ""
    dropped_replies = 0
    lost: WorkerLost | None = None

    def offer(self, worker: str) -> StreamRows:
        """See `FastWay`."""
        return self

    def accept(self, offer: str, router: str, end: Callable[[str], None]) -> StreamRows:
        """See `Acceptor`."""
        return self

    def accepted(self, text: str) -> StreamRows:
        """See `Offered`."""
        return self

    def start(self) -> None:
        """Nothing to serve."""

    def room(self, n_bytes: int) -> None:
        """Anywhere."""

    def send(self, rows: Rows) -> bool:
        """False: they go over the stream."""
        return False

    def receive(self, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """Never asked for."""
        raise WorkerLost("", "nothing was sent this way")

    def broken(self, reason: str) -> None:
        """Nobody waits here."""

    def close(self) -> None:
        """Nothing to end."""
