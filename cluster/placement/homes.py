"""Layouts that keep what is where it is: the present homes as a layout, and a new one with the fewest moves.

Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cluster.errors import PlacementError
from cluster.placement.layout import FREE, Floats, Ints, Layout
from cluster.placement.placement import Placement


class Named(Protocol):
    """A worker, as far as it matters here."""

    @property
    def name(self) -> str: ...


class Rules(NamedTuple):
    """What the homes of every layer have to be."""

    least: int  # homes of each expert
    pinned_LEW: NDArray[np.bool_]  # homes that have to be there

    @classmethod
    def of(cls, current: Placement, layers: Ints, fleet: Sequence[Named], n_experts: int, least: int) -> Self:
        """`least` homes each, and what is pinned in `current`."""
        at, i = (
            {worker.name: w for w, worker in enumerate(fleet)},
            {layer: i for i, layer in enumerate(layers.tolist())},
        )
        pinned_LEW = np.zeros((len(layers), n_experts, len(fleet)), bool)
        for pin in current.pins:
            if pin.worker in at and pin.layer in i:
                pinned_LEW[i[pin.layer], pin.expert, at[pin.worker]] = True
        return cls(least, pinned_LEW)


def keep(
    current: Placement, layers: Ints, fleet: Sequence[Named], worker_S: Ints, loads_LE: Floats, rules: Rules
) -> Layout:
    """The homes that experts of `layers` have on workers of `fleet`, made to follow the rules; see `obey`."""
    n_experts, n_workers = loads_LE.shape[1], len(fleet)
    at = {worker.name: w for w, worker in enumerate(fleet)}
    has_LEW = np.zeros((len(layers), n_experts, n_workers), bool)
    for i, layer in enumerate(layers.tolist()):
        for expert in range(n_experts):
            for name in current.holders(layer, expert):
                if name in at:
                    has_LEW[i, expert, at[name]] = True
    return layout_of(has_LEW, worker_S, loads_LE, rules)


def obey(layout: Layout, loads_LE: Floats, n_workers: int, rules: Rules) -> Layout:
    """`layout` with the fewest changes that make it follow the rules; rows are not divided any more.

    A worker that has fewer slots than replicas gives up those that others have too, fewest rows first; where only what
    an expert needs is in the way, it moves to a worker with a slot left. PlacementError where that cannot be.
    """
    if rules.least == 1 and not rules.pinned_LEW.any():
        return layout
    return layout_of(replicas(layout, loads_LE.shape[1], n_workers), layout.worker_S, loads_LE, rules)


def layout_of(has_LEW: NDArray[np.bool_], worker_S: Ints, loads_LE: Floats, rules: Rules) -> Layout:
    """The layout with these replicas, [L, E, W], made to follow the rules in place."""
    first_W = np.searchsorted(worker_S, np.arange(has_LEW.shape[2] + 1))
    expert_LS = np.full((len(has_LEW), len(worker_S)), FREE)
    for i, has_EW in enumerate(has_LEW):
        _repair(has_EW, np.diff(first_W), loads_LE[i], rules.least, rules.pinned_LEW[i])
        for w in range(has_EW.shape[1]):
            held = np.flatnonzero(has_EW[:, w])
            expert_LS[i, first_W[w] : first_W[w] + len(held)] = held
    return Layout(expert_LS, np.zeros(expert_LS.shape), worker_S)


def _repair(has_EW: NDArray[np.bool_], slots_W: Ints, load_E: Floats, least: int, pinned_EW: NDArray[np.bool_]) -> None:
    """Make the homes of one layer fit, in place: no worker above its slots, every expert in `least` places."""
    has_EW |= pinned_EW
    for w in np.flatnonzero(has_EW.sum(0) > slots_W).tolist():
        held = np.flatnonzero(has_EW[:, w] & ~pinned_EW[:, w])
        copies = has_EW[held].sum(1)
        # Those with copies elsewhere first, then those with few rows.
        leaving = max(0, int(has_EW[:, w].sum() - slots_W[w]))
        for expert in held[np.lexsort((load_E[held], copies <= least))][:leaving].tolist():
            has_EW[expert, w] = False
    wanting = np.flatnonzero(has_EW.sum(1) < least)
    for expert in wanting[np.argsort(-load_E[wanting], kind="stable")].tolist():
        while has_EW[expert].sum() < least:
            _add_home(has_EW, expert, slots_W, load_E, least, pinned_EW)


def _add_home(
    has_EW: NDArray[np.bool_], expert: int, slots_W: Ints, load_E: Floats, least: int, pinned_EW: NDArray[np.bool_]
) -> None:
    """One more home for `expert`: where a slot is free, or where a replica can go that is not needed there."""
    each_E = load_E / has_EW.sum(1).clip(1)
    free_W, absent_W = slots_W > has_EW.sum(0), ~has_EW[expert] & (slots_W > 0)
    if not (free_W & absent_W).any():
        surplus_EW = has_EW & ~pinned_EW & absent_W & (has_EW.sum(1) > least)[:, None]
        if surplus_EW.any():  # a copy too many: the one with the fewest rows
            rows, columns = np.nonzero(surplus_EW)
            k = int(each_E[rows].argmin())
            has_EW[rows[k], columns[k]] = False
        else:  # somebody's replica moves to a free slot on a worker that has this expert already
            movable_EW = has_EW & ~pinned_EW & absent_W
            for to in np.flatnonzero(free_W).tolist():
                rows, columns = np.nonzero(movable_EW & ~has_EW[:, to][:, None])
                if len(rows):
                    k = int(each_E[rows].argmin())
                    has_EW[rows[k], columns[k]], has_EW[rows[k], to] = False, True
                    break
            else:
                raise PlacementError(f"the slots of the workers do not suffice for {least} replicas of every expert")
        free_W = slots_W > has_EW.sum(0)
    time_W = np.where(free_W & absent_W, each_E @ has_EW, np.inf)
    has_EW[expert, int(time_W.argmin())] = True


def match(new: Layout, present: Layout, speed_W: Floats) -> Layout:
    """`new` with its workers exchanged for their equals so that as many replicas as possible stay where they are."""
    worker_S = new.worker_S
    slots_W = np.bincount(worker_S, minlength=len(speed_W))
    first_W = np.searchsorted(worker_S, np.arange(len(speed_W)))
    expert_LS, rows_LS = new.expert_LS.copy(), new.rows_LS.copy()
    overlap_LWW = [
        _overlap(new_S, present_S, worker_S, len(speed_W))
        for new_S, present_S in zip(new.expert_LS, present.expert_LS, strict=True)
    ]
    for speed, slots in sorted(set(zip(speed_W.tolist(), slots_W.tolist(), strict=True))):
        alike = np.flatnonzero((speed_W == speed) & (slots_W == slots))
        if not slots or len(alike) < 2:
            continue
        at_WS = first_W[alike][:, None] + np.arange(slots)
        for layer, overlap_WW in enumerate(overlap_LWW):
            goes = _assign(overlap_WW[np.ix_(alike, alike)])
            expert_LS[layer, at_WS[goes]] = new.expert_LS[layer, at_WS]
            rows_LS[layer, at_WS[goes]] = new.rows_LS[layer, at_WS]
    return Layout(expert_LS, rows_LS, worker_S)


def replicas(layout: Layout, n_experts: int, n_workers: int) -> NDArray[np.bool_]:
    """[L, E, W]: whether the worker holds the expert."""
    has = np.zeros((len(layout.expert_LS), n_experts, n_workers), bool)
    layers, slots = np.nonzero(layout.expert_LS != FREE)
    has[layers, layout.expert_LS[layers, slots], layout.worker_S[slots]] = True
    return has


def _overlap(new_S: Ints, present_S: Ints, worker_S: Ints, n_workers: int) -> Ints:
    """[W, W]: how many experts a worker of the new layout shares with one of the present layout."""
    new, present = np.nonzero((new_S[:, None] == present_S) & (new_S[:, None] != FREE))
    pair = worker_S[new] * n_workers + worker_S[present]
    return np.bincount(pair, minlength=n_workers**2).reshape(n_workers, n_workers)


def _assign(overlap_NN: Ints) -> Ints:
    """For each row a column of its own, largest overlaps first."""
    n = len(overlap_NN)
    goes = np.full(n, -1)
    taken = np.zeros(n, bool)
    rows, columns = np.nonzero(overlap_NN)
    for k in np.argsort(-overlap_NN[rows, columns], kind="stable").tolist():
        if goes[rows[k]] < 0 and not taken[columns[k]]:
            goes[rows[k]], taken[columns[k]] = columns[k], True
    goes[goes < 0] = np.flatnonzero(~taken)
    return goes
