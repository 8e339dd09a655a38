"""What is kept of an action on the placement."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.placement.load import imbalance
from cluster.placement.planner import Forecast


@dataclass(slots=True)
class Receipt:
    """One action on the placement: why, what it was to bring, what it cost, what came of it."""

    action: str
    began: float  # seconds since 1970
    epoch_before: int
    epoch_after: int = 0
    added: int = 0  # replicas
    removed: int = 0
    seconds: float = 0.0
    forecast: Forecast | None = None
    error: str = ""  # why it did not reach what it was to, and what is in force then
    imbalance_before: float = 1.0  # of the workers' rows in the window at its begin
    rows_then: dict[str, int] | None = None  # of each worker, since start, when it ended

    @property
    def verb(self) -> str:
        """The first word of what was asked for."""
        return self.action.partition(" ")[0].rstrip(":")

    def realised(self, rows_now: dict[str, int]) -> float | None:
        """Imbalance of the rows that workers got since; None before there were any."""
        then = self.rows_then
        if then is None:
            return None
        since = {worker: max(0, rows - then.get(worker, 0)) for worker, rows in rows_now.items()}
        return imbalance(since.values()) if sum(since.values()) > 0 else None
