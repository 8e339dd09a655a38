"""Finds the request that routers die of, without blaming those that were there too."""

from __future__ import annotations

from cluster.gateway.journal import Entry

# Routers lost in a row, without a token between, of which a request is taken for the reason.
MAX_LOSSES = 3


class Suspects:
    """A request that has one loss left runs while no other such request does: if its router dies again, it is why.

    Requests that were on the same routers by chance get their token, and are no suspects any more.
    """

    def __init__(self) -> None:
        self._tried: Entry | None = None

    def holds_back(self, entry: Entry) -> bool:
        """Whether `entry` has to wait for another's trial; if not, and it is suspected, its own begins."""
        if entry.losses < MAX_LOSSES - 1:
            return False
        self._tried = self._tried or entry
        return self._tried is not entry

    def clear(self, entry: Entry) -> bool:
        """`entry` got a token, or ended: whether that ends a trial, so that the next can begin."""
        if self._tried is not entry:
            return False
        self._tried = None
        return True
