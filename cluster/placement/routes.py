"""From a placement to the worker of each expert in one dispatch. Pure, no I/O.

Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from cluster.placement.placement import Placement

Ints = NDArray[np.int64]


class Routes:
    """Where rows go while the workers in `down` are to be avoided.

    All rows that a dispatch has for one expert go to one replica: an expert's rows are then the same batch whatever
    the placement, and so are its results to the last bit.
    """

    def __init__(self, placement: Placement, down: Collection[str] = ()) -> None:
        self.workers = placement.workers
        avoided = {index for index, worker in enumerate(placement.workers) if worker in down}
        self._owner_LE = np.zeros((len(placement.replicas), placement.n_experts), np.int64)
        self._choices: list[list[tuple[int, tuple[int, ...]]]] = []
        for layer, experts in enumerate(placement.replicas):
            choices = []
            for expert, holders in enumerate(experts):
                # An expert without a live replica stays with a dead one: the exchange waits for it.
                live = tuple(index for index in holders if index not in avoided) or holders
                self._owner_LE[layer, expert] = live[0]
                if len(live) > 1:
                    choices.append((expert, live))
            self._choices.append(choices)

    def has_choice(self, layer: int) -> bool:
        """Whether an expert of `layer` has more than one replica to go to."""
        return bool(self._choices[layer])

    def owners(self, layer: int, rows_E: Ints | None) -> Ints:
        """The worker (an index into `workers`) that computes each expert of `layer`, for a dispatch of `rows_E` rows.

        Where there is a choice, the replica on the worker with the fewest rows so far takes them, large loads first;
        `rows_E` is needed only there.
        """
        owner_E: Ints = self._owner_LE[layer]
        choices = self._choices[layer]
        if not choices:
            return owner_E
        assert rows_E is not None
        owner_E = owner_E.copy()
        fixed_E = rows_E.copy()
        fixed_E[[expert for expert, _ in choices]] = 0
        load_W = np.bincount(owner_E, fixed_E, minlength=len(self.workers))
        for expert, live in sorted(choices, key=lambda choice: -rows_E[choice[0]]):
            owner_E[expert] = owner = min(live, key=lambda index: load_W[index])
            load_W[owner] += rows_E[expert]
        return owner_E
