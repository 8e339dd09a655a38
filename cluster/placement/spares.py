"""Replicas for experts whose homes were lost: which live worker with a free slot takes which. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from cluster.placement.placement import Placement, Replica


def homeless(placement: Placement, away: Collection[str], least: int = 1) -> list[tuple[int, int]]:
    """The (layer, expert) pairs with fewer than `least` replicas on workers that are not `away`."""
    gone = {index for index, worker in enumerate(placement.workers) if worker in away}
    return [
        (layer, expert)
        for layer, experts in enumerate(placement.replicas)
        for expert, holders in enumerate(experts)
        if sum(index not in gone for index in holders) < least
    ]


def sheltered(placement: Placement, away: Collection[str], slots: Mapping[str, int], least: int = 1) -> Placement:
    """The next placement, in which every expert has `least` replicas on workers of `slots`, as far as slots are free.

    Those that are `away` keep what they have: they may come back with it. What is added has no share, so that it gets
    rows only while they are away. slots: experts that each live worker can hold; 0: not known.
    """
    homes = placement.homes()
    live = [worker for worker in sorted(slots) if worker not in away]
    held = Counter(replica.worker for replica in placement.all_replicas())
    for layer, expert in homeless(placement, away, least):
        here = homes[layer][expert]
        while sum(worker not in away for worker in here) < least:
            room = [w for w in live if w not in here and not 0 < slots[w] <= held[w]]
            if not room:
                break
            target = min(room, key=lambda worker: held[worker])
            here[target] = 0.0
            held[target] += 1
    workers = (*placement.workers, *(worker for worker in live if worker not in placement.workers and held[worker]))
    return Placement.of(placement.epoch + 1, workers, homes, placement.pins)


def without(placement: Placement, replicas: Collection[Replica]) -> Placement:
    """The next placement without those of `replicas` that have no share, are not pinned and leave another behind."""
    homes = placement.homes()
    for worker, layer, expert in sorted(replicas):
        here = homes[layer][expert]
        if here.get(worker) == 0.0 and len(here) > 1 and Replica(worker, layer, expert) not in placement.pins:
            del here[worker]
    return Placement.of(placement.epoch + 1, placement.workers, homes, placement.pins)
