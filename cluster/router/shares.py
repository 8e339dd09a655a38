"""Fair shares of one router between its tenants: those whose keys requests came with, or all as one without keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.router.sequence import Sequence


def fair_seats(demands: Mapping[str, int], tenant: str, n_seats: int) -> float:
    """How many of `n_seats` are for `tenant` where each has as many requests as `demands` says: nobody gets more than
    it asks for, and what one leaves the others divide evenly (max-min fairness)."""
    left, n_others = float(n_seats), len(demands)
    for demand in sorted(demands.values()):
        level = left / n_others
        if demand > level:
            return min(demands.get(tenant, 0), level)
        left, n_others = left - demand, n_others - 1
    return demands.get(tenant, 0)


class Shares:
    """Parts of a router that tenants hold: of its seats or of its KV blocks, whichever is greater (dominant resource
    fairness, Ghodsi et al., NSDI 2011, section 4.1)."""

    def __init__(self, running: Iterable[Sequence], n_seats: int, n_blocks: int) -> None:
        self._n_seats, self._n_blocks = n_seats, n_blocks
        self._held: dict[str, tuple[int, int]] = {}  # seats, blocks
        for sequence in running:
            seats, blocks = self._held.get(sequence.params.tenant, (0, 0))
            self._held[sequence.params.tenant] = (seats + 1, blocks + len(sequence.blocks))

    def of(self, tenant: str, seats: int = 0, blocks: int = 0) -> float:
        """The part that `tenant` holds, 0 to 1, or would with so many more seats and blocks."""
        held_seats, held_blocks = self._held.get(tenant, (0, 0))
        return max((held_seats + seats) / self._n_seats, (held_blocks + blocks) / self._n_blocks)

    def greatest(self) -> str:
        """The tenant that holds most; somebody has to run."""
        return max(self._held, key=self.of)
