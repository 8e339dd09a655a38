"""A placement reached in small steps, each of which fits beside what is there. Pure.

A worker loads what a step adds before it unloads what the step removes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from cluster.errors import PlacementError
from cluster.placement.placement import Placement, Replica


def steps(current: Placement, goal: Placement, slots: Mapping[str, int], at_most: int) -> Iterator[Placement]:
    """Placements from the one after `current` to `goal`, each adding at most about `at_most` replicas.

    slots: replicas that each worker can hold at one time; 0 or missing: not known. Raises PlacementError when workers
    are so full that nothing can be moved.
    """
    now, then = current.homes(), goal.homes()
    changed = [
        (layer, expert)
        for layer in range(current.n_layers)
        for expert in range(len(current.replicas[layer]))
        if now[layer][expert] != then[layer][expert]
    ]
    workers = (*current.workers, *(worker for worker in goal.workers if worker not in current.workers))
    held = Counter(replica.worker for replica in current.all_replicas())
    epoch = current.epoch
    while changed:
        added: Counter[str] = Counter()
        taken: list[tuple[int, int]] = []
        removed: list[Replica] = []
        for layer, expert in changed:
            gains = then[layer][expert].keys() - now[layer][expert].keys()
            if added.total() + len(gains) > max(1, at_most) and taken:
                continue
            if any(0 < slots.get(worker, 0) < held[worker] + added[worker] + 1 for worker in gains):
                continue
            added.update(gains)
            removed += [
                Replica(worker, layer, expert) for worker in now[layer][expert].keys() - then[layer][expert].keys()
            ]
            now[layer][expert] = then[layer][expert]
            taken.append((layer, expert))
        if not taken:
            full = ", ".join(sorted(worker for worker in held if held[worker] >= slots.get(worker, 0) > 0))
            raise PlacementError(f"nothing can be moved while {full} have no free slot; give --expert-slots one more")
        held.update(added)
        held.subtract(replica.worker for replica in removed)
        changed = [pair for pair in changed if pair not in set(taken)]
        epoch += 1
        names = workers if changed else goal.workers
        yield Placement.of(epoch, names, now, goal.pins)
