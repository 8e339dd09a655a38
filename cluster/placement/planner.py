"""Which replicas to have, where, and with which shares: from loads to a plan. Pure and deterministic.

Replica counts, homes and shares are one problem and are solved as one, layer by layer, since a step waits for the
slowest worker of every layer: the largest time of a worker is to be least. Of three ways to fill a layer's slots
(`layout`, `pairs`) the best one counts, with rows divided as its homes allow (`shares`); and a layer whose present
homes do as well when their rows are divided anew keeps them.

Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import PlacementError
from cluster.placement.adjust import adjust
from cluster.placement.homes import Rules, keep, match, obey
from cluster.placement.layout import FREE, Floats, Ints, Layout, fill_exactly, replicate_and_pack
from cluster.placement.pairs import pair_up
from cluster.placement.placement import Placement
from cluster.placement.shares import counts, divide
from cluster.placement.swaps import swap

_LARGE = 1e100
_SLACKS = (1e-9, 0.001, 0.003, 0.01, 0.03, 0.1)  # how much longer than the mean a layer may take, tried in this order


@dataclass(frozen=True, slots=True)
class Worker:
    """An expert worker as the planner sees it."""

    name: str
    slots: int  # replicas it may hold, over all layers
    speed: float = 1.0  # rows per second, by those of any other worker
    host: str = ""  # replicas of one expert go to different hosts where that costs nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may cost, and what is not worth a move."""

    expert_bytes: int = 1
    moved_bytes: int | None = None  # at most so many are loaded; None: any number
    tolerance: float = 0.01  # a layer within this of the best that was found keeps its homes; inf: whatever it costs
    least_homes: int = 1  # of every expert, each on another worker
    bytes_per_s: float = 1e9  # at which replicas are loaded: for the forecast


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan is expected to do. Imbalance: the sum over layers of max load / speed, by that of mean load."""

    imbalance_before: float
    imbalance_after: float
    moved_replicas: int
    moved_bytes: int
    seconds: float  # to load them, one after another
    gain: float  # part of the experts' time that is saved


@dataclass(frozen=True, slots=True)
class Plan:
    """The next placement, and why."""

    placement: Placement
    forecast: Forecast


def balance(loads_LE: Floats, workers: Sequence[Worker], current: Placement, limits: Limits | None = None) -> Plan:
    """The placement that makes the largest worker load least, its epoch following `current`.

    loads_LE: rows of each expert, [L, E], at least 0. Only `workers` hold anything afterwards. Raises PlacementError
    when their slots do not suffice for `Limits.least_homes` of every expert, and for loads or speeds that are none.

    What is pinned in `current` stays, and takes its share.
    """
    sparse = [layer for layer, experts in enumerate(current.replicas) if experts]
    if len(sparse) < current.n_layers:
        plan = balance(loads_LE[sparse], workers, current.only(sparse), limits)
        back = {layer: i for i, layer in enumerate(sparse)}
        return replace(plan, placement=plan.placement.only([back.get(layer, -1) for layer in range(current.n_layers)]))
    limits = limits or Limits()
    fleet = _interleaved(workers)
    n_layers, n_experts = loads_LE.shape
    _check(current, fleet, n_experts, limits.least_homes)
    if not np.isfinite(loads_LE).all() or (loads_LE < 0).any():
        raise PlacementError("loads are finite numbers, 0 or more")
    if loads_LE.max(initial=0.0) > _LARGE:  # their sums are to be finite too
        loads_LE = loads_LE / loads_LE.max()
    # An expert without rows needs a home all the same, and a little is what makes it count.
    loads_LE = np.maximum(loads_LE, loads_LE.mean() * 1e-6 + 1e-12)
    speed_W = np.array([worker.speed for worker in fleet])
    homes: list[list[dict[str, float]]] = [[] for _ in range(n_layers)]
    moves_L = np.zeros(n_layers, np.int64)
    options: list[_Option] = []
    for layers, slots_W in _slots(fleet, n_layers, n_experts):
        worker_S = np.repeat(np.arange(len(fleet)), slots_W)
        rules = Rules.of(current, layers, fleet, n_experts, limits.least_homes)
        here_LE = loads_LE[layers]
        kept = divide(here_LE, keep(current, layers, fleet, worker_S, here_LE, rules), speed_W)
        best = match(_best(here_LE, worker_S, speed_W, rules.least), kept, speed_W)
        if (ruled := obey(best, here_LE, len(fleet), rules)) is not best:
            best = divide(here_LE, ruled, speed_W)
        best_L = best.times(speed_W).max(1)
        enough_L = best_L * (1 + limits.tolerance)
        if np.isfinite(
            limits.tolerance
        ):  # not above what equal shares would do with as many slots, however near that is
            equal_L = replicate_and_pack(here_LE, worker_S, speed_W).times(speed_W).max(1)
            enough_L = np.minimum(enough_L, np.maximum(best_L, equal_L))
        adjusted = divide(here_LE, adjust(kept, counts(best.expert_LS, n_experts), here_LE, speed_W, rules), speed_W)
        ways = [kept, best]
        for start in (adjusted, kept):
            swapped = swap(start, here_LE, speed_W, enough_L)
            if (ruled := obey(swapped, here_LE, len(fleet), rules)) is not swapped:
                swapped = divide(here_LE, ruled, speed_W)
            ways.insert(1, swapped)
        times = [layout.times(speed_W).max(1) for layout in ways]
        for i, layer in enumerate(layers.tolist()):
            homes[layer] = _homes(kept, i, fleet, n_experts)
            moves_L[layer] = _moves(current, layer, homes[layer])
            if times[0][i] > enough_L[i]:
                options.append(_fewest_moves(current, layer, i, ways, times, enough_L[i], fleet, n_experts))
    left = np.inf if limits.moved_bytes is None else limits.moved_bytes // limits.expert_bytes - moves_L.sum()
    for option in sorted(options, key=lambda option: (-option.gain, option.layer)):
        if option.moves - moves_L[option.layer] <= left:
            left -= option.moves - moves_L[option.layer]
            homes[option.layer], moves_L[option.layer] = option.homes, option.moves
    names = sorted(worker.name for worker in fleet)
    placement = Placement.of(current.epoch + 1, names, homes, current.pins)
    return Plan(placement, _forecast(loads_LE, fleet, current, placement, int(moves_L.sum()), limits))


def imbalance(loads_LE: Floats, workers: Sequence[Worker], placement: Placement) -> float:
    """Sum over layers of the largest time of a worker, by the sum of the mean times; 1.0 is perfect."""
    at = {worker.name: i for i, worker in enumerate(workers)}
    speed_W = np.array([worker.speed for worker in workers])
    time_LW = np.zeros((placement.n_layers, len(workers)))
    for layer in range(placement.n_layers):
        for expert in range(len(placement.replicas[layer])):
            homes = zip(placement.holders(layer, expert), placement.share(layer, expert), strict=True)
            for worker, share in homes:
                if worker in at:
                    time_LW[layer, at[worker]] += share * loads_LE[layer, expert] / speed_W[at[worker]]
    mean = loads_LE.sum() / speed_W.sum()
    return float(time_LW.max(1).sum() / mean) if mean > 0 else 1.0


@dataclass(frozen=True, slots=True)
class _Option:
    """New homes for a layer."""

    gain: float  # time saved for each replica that is loaded
    layer: int
    homes: list[dict[str, float]]
    moves: int


def _check(current: Placement, fleet: Sequence[Worker], n_experts: int, least: int) -> None:
    """Raise PlacementError unless the workers have room for `least` homes of every expert, and for what is pinned."""
    n_slots, needed = sum(worker.slots for worker in fleet), current.n_layers * n_experts * least
    if len(fleet) < least:
        wanted = "experts need a worker" if least == 1 else f"{least} replicas of every expert need {least} workers"
        raise PlacementError(f"{wanted}; there are {len(fleet)} that may be used")
    if n_slots < needed:
        experts = f"{needed} experts" if least == 1 else f"{least} replicas of {needed // least} experts"
        raise PlacementError(
            f"{experts} do not fit into the {n_slots} slots of "
            f"{len(fleet)} workers; more workers, or a larger --expert-slots, make room"
        )
    if standing := [worker.name for worker in fleet if not 0 < worker.speed < np.inf]:
        raise PlacementError(f"the speed of {', '.join(standing)} is no number above 0")
    names = {worker.name for worker in fleet}
    for pin in sorted(current.pins):
        if pin.worker not in names:
            where = f"{pin.layer}:{pin.expert}@{pin.worker}"
            raise PlacementError(f"{where} is pinned; `expertmesh placement unpin {where}` lets it go")


def _fewest_moves(
    current: Placement,
    layer: int,
    at: int,
    ways: Sequence[Layout],
    times: Sequence[Floats],
    enough: float,
    fleet: Sequence[Worker],
    n_experts: int,
) -> _Option:
    """Of the `ways` that are good enough for a layer, which is number `at` in them, the one that loads least."""
    options = []
    for layout, time_L in zip(ways[1:], times[1:], strict=True):
        if time_L[at] <= enough:
            go = _homes(layout, at, fleet, n_experts)
            moves = _moves(current, layer, go)
            options.append(_Option(float(times[0][at] - time_L[at]) / max(1, moves), layer, go, moves))
    return min(options, key=lambda option: option.moves)


def _best(loads_LE: Floats, worker_S: Ints, speed_W: Floats, least: int) -> Layout:
    """The best of all ways for each layer, without regard to what is where."""
    mean_L = loads_LE.sum(1) / speed_W.sum()
    layout = divide(loads_LE, replicate_and_pack(loads_LE, worker_S, speed_W, least), speed_W)
    expert_LS, rows_LS = layout.expert_LS.copy(), layout.rows_LS.copy()
    largest_L = layout.times(speed_W).max(1)
    if least == 1 and (np.bincount(worker_S, minlength=len(speed_W)) == 2).all() and (speed_W == speed_W[0]).all():
        paired = pair_up(loads_LE, worker_S, largest_L * speed_W[0])
        found = (paired.expert_LS != FREE).any(1)
        expert_LS[found], rows_LS[found] = paired.expert_LS[found], paired.rows_LS[found]
        largest_L = Layout(expert_LS, rows_LS, worker_S).times(speed_W).max(1)
    if least > 1 or len(worker_S) < loads_LE.shape[1] + len(speed_W) - 1:
        # The other way would cut an expert at every worker, and there are not so many slots.
        return Layout(expert_LS, rows_LS, worker_S)
    left = np.arange(len(loads_LE))
    for slack in _SLACKS:
        left = left[largest_L[left] > mean_L[left] * (1 + slack)]
        if not len(left):
            break
        filled, complete = fill_exactly(loads_LE[left], worker_S, speed_W, mean_L[left] * (1 + slack))
        done = left[complete]
        expert_LS[done], rows_LS[done] = filled.expert_LS[complete], filled.rows_LS[complete]
        left = left[~complete]
    return Layout(expert_LS, rows_LS, worker_S)


def _interleaved(workers: Sequence[Worker]) -> list[Worker]:
    """By turns from each host: an expert that is cut is on neighbours."""
    rank: dict[str, int] = {}
    keyed = []
    for worker in sorted(workers, key=lambda worker: (worker.host, worker.name)):
        rank[worker.host] = rank.get(worker.host, 0) + 1
        keyed.append((rank[worker.host], worker.host, worker.name, worker))
    return [worker for *_, worker in sorted(keyed, key=lambda key: key[:3])]


def _slots(fleet: Sequence[Worker], n_layers: int, n_experts: int) -> list[tuple[Ints, Ints]]:
    """Layers that have the same slots, and how many each worker has for one of them: every worker's are spread evenly,
    the rest of a worker going on with the layer where that of the one before it ended."""
    slots_LW: Ints = np.zeros((n_layers, len(fleet)), np.int64)
    at = 0
    for w, worker in enumerate(fleet):
        base, rest = divmod(min(worker.slots, n_layers * n_experts), n_layers)
        slots_LW[:, w] = base
        slots_LW[(at + np.arange(rest)) % n_layers, w] += 1
        at += rest
    slots_LW = slots_LW.clip(0, n_experts)
    kinds, kind_L = np.unique(slots_LW, axis=0, return_inverse=True)
    return [(np.flatnonzero(kind_L.ravel() == kind), kinds[kind]) for kind in range(len(kinds))]


def _homes(layout: Layout, layer: int, fleet: Sequence[Worker], n_experts: int) -> list[dict[str, float]]:
    homes: list[dict[str, float]] = [{} for _ in range(n_experts)]
    slots = zip(layout.expert_LS[layer].tolist(), layout.rows_LS[layer].tolist(), layout.worker_S.tolist(), strict=True)
    for expert, rows, worker in slots:
        if expert != FREE:
            homes[expert][fleet[worker].name] = rows
    return homes


def _moves(current: Placement, layer: int, homes: Sequence[dict[str, float]]) -> int:
    """Replicas that are to be loaded."""
    return sum(len(here.keys() - set(current.holders(layer, expert))) for expert, here in enumerate(homes))


def _forecast(
    loads_LE: Floats, fleet: Sequence[Worker], before: Placement, after: Placement, moved: int, limits: Limits
) -> Forecast:
    speed = float(np.mean([worker.speed for worker in fleet]))
    leaving = [Worker(name, 0, speed) for name in sorted(before.holding - {worker.name for worker in fleet})]
    was, becomes = imbalance(loads_LE, [*fleet, *leaving], before), imbalance(loads_LE, fleet, after)
    n_bytes = moved * limits.expert_bytes
    gain = max(0.0, 1 - becomes / was) if was > 0 else 0.0
    return Forecast(was, becomes, moved, n_bytes, n_bytes / limits.bytes_per_s, gain)
