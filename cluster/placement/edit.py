"""Single changes of a placement, and what any placement has to be. Pure; each raises PlacementError with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.errors import PlacementError
from cluster.placement.placement import Placement, Replica


def replicate(placement: Placement, layer: int, expert: int, worker: str) -> Placement:
    """The next placement, with another replica of `(layer, expert)` on `worker`; all of its replicas share equally."""
    homes = _homes(placement, layer, expert)
    if worker in homes[layer][expert]:
        raise PlacementError(f"{worker} has a replica of layer {layer}, expert {expert} already")
    homes[layer][expert] = dict.fromkeys((*homes[layer][expert], worker), 1.0)
    return _next(placement, homes, worker)


def pin(placement: Placement, layer: int, expert: int, worker: str) -> Placement:
    """The next placement, in which `worker` has a replica of `(layer, expert)` that no plan takes away."""
    homes = _homes(placement, layer, expert)
    if worker not in homes[layer][expert]:
        placement = replicate(placement, layer, expert, worker).numbered(placement.epoch)
    pins = placement.pins | {Replica(worker, layer, expert)}
    return replace(placement, epoch=placement.epoch + 1, pins=pins)


def unpin(placement: Placement, layer: int, expert: int, worker: str) -> Placement:
    """The next placement, in which that replica may go wherever a plan wants it."""
    if (pinned := Replica(worker, layer, expert)) not in placement.pins:
        raise PlacementError(f"layer {layer}, expert {expert} is not pinned to {worker}")
    return replace(placement, epoch=placement.epoch + 1, pins=placement.pins - {pinned})


def drop(placement: Placement, layer: int, expert: int, worker: str) -> Placement:
    """The next placement, without the replica of `(layer, expert)` on `worker`; the others take its share."""
    homes = _homes(placement, layer, expert)
    here = homes[layer][expert]
    if worker not in here:
        raise PlacementError(_absent(placement, layer, expert, worker))
    if len(here) == 1:
        raise PlacementError(
            f"{worker} has the only replica of layer {layer}, expert {expert}; replicate or move it instead"
        )
    _check_pin(placement, Replica(worker, layer, expert))
    del here[worker]
    return _next(placement, homes)


def move(placement: Placement, layer: int, expert: int, source: str | None, target: str) -> Placement:
    """The next placement, with the replica of `(layer, expert)` on `target` instead of `source`.

    `source` may be None when there is one replica only.
    """
    homes = _homes(placement, layer, expert)
    here = homes[layer][expert]
    if source is None:
        if len(here) != 1:
            raise PlacementError(
                f"layer {layer}, expert {expert} has replicas on {', '.join(here)}; say which of them is to move"
            )
        [source] = here
    if source not in here:
        raise PlacementError(_absent(placement, layer, expert, source))
    if target in here:
        raise PlacementError(f"{target} has a replica of layer {layer}, expert {expert} already")
    _check_pin(placement, Replica(source, layer, expert))
    here[target] = here.pop(source)
    return _next(placement, homes, target)


def check_there(placement: Placement, layer: int, expert: int) -> None:
    """PlacementError unless the model has that expert."""
    if not 0 <= layer < placement.n_layers:
        raise PlacementError(f"there is no layer {layer}; layers are 0 to {placement.n_layers - 1}")
    if not placement.replicas[layer]:
        raise PlacementError(f"layer {layer} is dense: it has no experts")
    if not 0 <= expert < placement.n_experts:
        raise PlacementError(f"there is no expert {expert}; experts are 0 to {placement.n_experts - 1}")


def check(placement: Placement, slots: Mapping[str, int], before: Placement | None = None) -> None:
    """Raise PlacementError unless every expert has a replica, each on a worker of `slots`, and none has too many.

    slots: how many replicas each worker that there is can hold; 0: not known. before: what a worker has there it may
    keep while it is away, since it comes back with that.
    """
    had = frozenset() if before is None else before.all_replicas()
    for layer, experts in enumerate(placement.replicas):
        for expert, holders in enumerate(experts):
            if not holders:
                raise PlacementError(f"layer {layer}, expert {expert} would have no replica")
            if len(set(holders)) != len(holders):
                raise PlacementError(f"layer {layer}, expert {expert} has two replicas on one worker")
    for worker in placement.workers:
        shard = placement.shard(worker)
        n_held = len(shard)
        if worker not in slots and any(Replica(worker, *pair) not in had for pair in shard):
            raise PlacementError(f"there is no expert worker {worker}; there are {', '.join(sorted(slots)) or 'none'}")
        # One that has more than it has room for now, as after a drain that is undone, may keep that.
        n_before = 0 if before is None else len(before.shard(worker))
        if n_held > slots.get(worker, 0) > 0 and n_held > n_before:
            raise PlacementError(f"{worker} has room for {slots[worker]} experts and would hold {n_held}")


def _homes(placement: Placement, layer: int, expert: int) -> list[list[dict[str, float]]]:
    check_there(placement, layer, expert)
    return placement.homes()


def _next(placement: Placement, homes: list[list[dict[str, float]]], worker: str | None = None) -> Placement:
    """The placement after `placement`, with other homes; `worker` may be new in it."""
    workers = placement.workers if worker is None or worker in placement.workers else (*placement.workers, worker)
    return Placement.of(placement.epoch + 1, workers, homes, placement.pins)


def _check_pin(placement: Placement, replica: Replica) -> None:
    if replica in placement.pins:
        where = f"{replica.layer}:{replica.expert}@{replica.worker}"
        raise PlacementError(f"{where} is pinned; `expertmesh placement unpin {where}` lets it go")


def _absent(placement: Placement, layer: int, expert: int, worker: str) -> str:
    there = ", ".join(placement.holders(layer, expert))
    return f"{worker} has no replica of layer {layer}, expert {expert}; those are on {there}"
