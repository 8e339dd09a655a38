"""Sums over all actions on the placement; the receipts themselves are kept for a while only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cluster.control.receipt import Receipt


@dataclass(slots=True)
class Tally:
    """By verb: the first word of what was asked for."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)  # of float
    loaded: Counter[str] = field(default_factory=Counter)  # replicas
    rebalanced: Receipt | None = None  # the last rebalance that succeeded
    rebalanced_at: float = 0.0  # when it ended, seconds since 1970

    def add(self, receipt: Receipt) -> None:
        """An action that has ended."""
        verb = receipt.verb
        (self.failed if receipt.error else self.done)[verb] += 1
        self.seconds[verb] += receipt.seconds  # type: ignore[assignment]  # a Counter of float
        self.loaded[verb] += receipt.added
        if verb == "rebalance" and not receipt.error:
            self.rebalanced, self.rebalanced_at = receipt, receipt.began + receipt.seconds
