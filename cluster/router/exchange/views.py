"""The view in force, and under which epochs rows are still on their way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from cluster.placement.placement import Placement


class View(NamedTuple):
    """A placement, and where its workers are. A worker without an address is known to be away."""

    placement: Placement
    addresses: Mapping[str, str]


class Views:
    """The view that was published last, and the one in force. `publish`, `epoch` and `close` are for any thread."""

    def __init__(self, view: View) -> None:
        self.current = view  # in force: the step loop's alone
        self._published = view
        self._outstanding: Counter[int] = Counter()  # dispatches not yet combined, by epoch
        self._closed = False
        self._changed = threading.Condition()

    @property
    def published(self) -> View:
        """The newest."""
        return self._published

    @property
    def epoch(self) -> int:
        """The acknowledgement: no rows are, or will be, routed under an older epoch than this one."""
        with self._changed:
            return min((epoch for epoch, n in self._outstanding.items() if n), default=self._published.placement.epoch)

    @property
    def closed(self) -> bool:
        return self._closed

    def publish(self, view: View) -> None:
        """`view` is in force from the next dispatch on."""
        with self._changed:
            self._published = view
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits for news any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def enter(self) -> tuple[int, bool]:
        """The newest view comes into force, and a dispatch under it is outstanding from now on: its epoch, and whether
        the view is another."""
        with self._changed:
            changed = self._take()
            epoch = self.current.placement.epoch
            self._outstanding[epoch] += 1
            return epoch, changed

    def take(self) -> bool:
        """The newest view comes into force within a dispatch; whether it is another."""
        with self._changed:
            return self._take()

    def leave(self, epoch: int) -> None:
        """A dispatch under `epoch` is complete."""
        with self._changed:
            self._outstanding[epoch] -= 1

    def abandon(self) -> None:
        """What was dispatched and is not complete will not be."""
        with self._changed:
            self._outstanding.clear()

    @property
    def is_alone(self) -> bool:
        """Whether one dispatch alone is outstanding."""
        return self._outstanding.total() == 1

    def wait(self, timeout_s: float) -> bool:
        """Wait for a newer view than the one in force; whether there is one, or the end."""
        with self._changed:
            return self._changed.wait_for(lambda: self._published is not self.current or self._closed, timeout_s)

    def _take(self) -> bool:
        changed = self._published is not self.current
        self.current = self._published
        return changed
