"""From a placement to the worker of each expert in one dispatch. Pure, no I/O.

Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.placement.placement import Placement

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Choice:
    """An expert with several live replicas."""

    expert: int
    workers: tuple[int, ...]
    shares: tuple[float, ...]  # above 0
    rows: list[int]  # that each has been given

    def next(self, rows: int) -> int:
        """Which of them would have the fewest rows for its share, with these."""
        given, shares = self.rows, self.shares
        return min(range(len(given)), key=lambda i: (given[i] + rows) / shares[i])


class Routes:
    """Where rows go while the workers in `down` are to be avoided, of whom those in `silent` do not even answer. Used
    by one thread.

    All rows that a dispatch has for one expert go to one replica, and over many dispatches each replica gets its
    share. Results do not depend on the choice: the rows of an expert give the same bits whatever they are
    computed with.
    """

    def __init__(self, placement: Placement, down: Collection[str] = (), silent: Collection[str] = ()) -> None:
        self.workers = placement.workers
        self.n_experts = placement.n_experts
        avoided = {index for index, worker in enumerate(placement.workers) if worker in down}
        self._owner_LE = np.zeros((len(placement.replicas), placement.n_experts), np.int64)
        self._is_alone_LW = [[False] * len(placement.workers) for _ in placement.replicas]
        self._choices: list[list[_Choice]] = []
        for layer, experts in enumerate(placement.replicas):
            choices = []
            for expert, holders in enumerate(experts):
                homes = zip(holders, placement.share(layer, expert), strict=True)
                live = [(index, share) for index, share in homes if index not in avoided]
                # A replica without a share is a spare: it takes rows when the others are down.
                active = [(index, share) for index, share in live if share > 0] or [(index, 1.0) for index, _ in live]
                # Without a live replica the exchange waits for one: best for one that answers again.
                last_resort = next((index for index in holders if self.workers[index] not in silent), holders[0])
                self._owner_LE[layer, expert] = active[0][0] if active else last_resort
                if len(live) < 2:
                    self._is_alone_LW[layer][self._owner_LE[layer, expert]] = True
                if len(active) > 1:
                    workers, shares = zip(*active, strict=True)
                    choices.append(_Choice(expert, workers, shares, [0] * len(active)))
            self._choices.append(choices)
        #: Whether `has_others` is so of every worker and layer.
        self.all_have_others = not any(map(any, self._is_alone_LW))

    def step_owners(self) -> Ints:
        """A worker for every expert [L, E], for a step whose rows nobody knows beforehand: of several replicas the one
        whose rows are the fewest for its share. What it takes is said by `took`."""
        owner_LE: Ints = self._owner_LE.copy()
        for layer, choices in enumerate(self._choices):
            for choice in choices:
                owner_LE[layer, choice.expert] = choice.workers[choice.next(1)]
        return owner_LE

    def took(self, owner_LE: Ints, rows_LE: Ints) -> None:
        """The rows of a step, by the owners that it had."""
        for layer, choices in enumerate(self._choices):
            for choice in choices:
                worker = int(owner_LE[layer, choice.expert])
                choice.rows[choice.workers.index(worker)] += int(rows_LE[layer, choice.expert])

    def has_others(self, layer: int, worker: int) -> bool:
        """Whether whatever the worker with index `worker` computes of `layer` could be computed elsewhere too."""
        return not self._is_alone_LW[layer][worker]

    def has_choice(self, layer: int) -> bool:
        """Whether an expert of `layer` has more than one replica to go to."""
        return bool(self._choices[layer])

    def owners(self, layer: int, rows_E: Ints | None) -> Ints:
        """The worker (an index into `workers`) that computes each expert of `layer`, for a dispatch of `rows_E` rows.

        The replica whose rows, with these, would be the fewest for its share takes them. `rows_E` is needed only
        where there is a choice.
        """
        owner_E: Ints = self._owner_LE[layer]
        choices = self._choices[layer]
        if not choices:
            return owner_E
        assert rows_E is not None
        owner_E = owner_E.copy()
        for choice in choices:
            if rows := int(rows_E[choice.expert]):
                best = choice.next(rows)
                choice.rows[best] += rows
                owner_E[choice.expert] = choice.workers[best]
        return owner_E
