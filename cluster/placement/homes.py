"""Layouts that keep what is where it is: the present homes as a layout, and a new one with the fewest moves.

Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.placement.layout import FREE, Floats, Ints, Layout
from cluster.placement.placement import Placement


class Named(Protocol):
    """A worker, as far as it matters here."""

    @property
    def name(self) -> str: ...


def keep(current: Placement, layers: Ints, fleet: Sequence[Named], worker_S: Ints, loads_LE: Floats) -> Layout:
    """The homes that experts of `layers` have on workers of `fleet`, repaired: one without any gets one.

    A worker that has fewer slots than replicas gives up those that others have too, fewest rows first; where only the
    last replica of an expert is in the way, it moves to a worker with a slot left. Rows are not divided yet.
    """
    n_experts, n_workers = loads_LE.shape[1], len(fleet)
    at = {worker.name: w for w, worker in enumerate(fleet)}
    first_W = np.searchsorted(worker_S, np.arange(n_workers + 1))
    expert_LS = np.full((len(layers), len(worker_S)), FREE)
    for i, layer in enumerate(layers.tolist()):
        has_EW = np.zeros((n_experts, n_workers), bool)
        for expert in range(n_experts):
            for name in current.holders(layer, expert):
                if name in at:
                    has_EW[expert, at[name]] = True
        _repair(has_EW, np.diff(first_W), loads_LE[i])
        for w in range(n_workers):
            held = np.flatnonzero(has_EW[:, w])
            expert_LS[i, first_W[w] : first_W[w] + len(held)] = held
    return Layout(expert_LS, np.zeros(expert_LS.shape), worker_S)


def _repair(has_EW: NDArray[np.bool_], slots_W: Ints, load_E: Floats) -> None:
    """Make the homes of one layer fit, in place: no worker above its slots, every expert somewhere."""
    for w in np.flatnonzero(has_EW.sum(0) > slots_W).tolist():
        held = np.flatnonzero(has_EW[:, w])
        copies = has_EW[held].sum(1)
        # Those with copies elsewhere first, then those with few rows.
        for expert in held[np.lexsort((load_E[held], copies == 1))][: len(held) - slots_W[w]].tolist():
            has_EW[expert, w] = False
    homeless = np.flatnonzero(~has_EW.any(1))
    for expert in homeless[np.argsort(-load_E[homeless], kind="stable")].tolist():
        free_W = slots_W - has_EW.sum(0)
        if free_W.max() <= 0:  # somebody has a copy too many, since all experts fit
            copies_E = has_EW.sum(1)
            spare = min(np.flatnonzero(copies_E > 1).tolist(), key=lambda e: load_E[e] / copies_E[e])
            has_EW[spare, np.flatnonzero(has_EW[spare])[-1]] = False
            free_W = slots_W - has_EW.sum(0)
        each_E = load_E / has_EW.sum(1).clip(1)
        time_W = np.where(free_W > 0, each_E @ has_EW, np.inf)
        has_EW[expert, int(time_W.argmin())] = True


def match(new: Layout, present: Layout, speed_W: Floats) -> Layout:
    """`new` with its workers exchanged for their equals so that as many replicas as possible stay where they are."""
    worker_S = new.worker_S
    slots_W = np.bincount(worker_S, minlength=len(speed_W))
    first_W = np.searchsorted(worker_S, np.arange(len(speed_W)))
    expert_LS, rows_LS = new.expert_LS.copy(), new.rows_LS.copy()
    n_layers = len(expert_LS)
    n_experts = int(max(new.expert_LS.max(), present.expert_LS.max())) + 1
    n_workers = len(speed_W)
    new_LEW, present_LEW = _incidence(new, n_experts, n_workers), _incidence(present, n_experts, n_workers)
    overlap_LWW = [new_EW.T @ present_EW for new_EW, present_EW in zip(new_LEW, present_LEW, strict=True)]
    for speed, slots in sorted(set(zip(speed_W.tolist(), slots_W.tolist(), strict=True))):
        alike = np.flatnonzero((speed_W == speed) & (slots_W == slots))
        if not slots or len(alike) < 2:
            continue
        at_WS = first_W[alike][:, None] + np.arange(slots)
        for layer in range(n_layers):
            goes = _assign(overlap_LWW[layer][np.ix_(alike, alike)])
            expert_LS[layer, at_WS[goes]] = new.expert_LS[layer, at_WS]
            rows_LS[layer, at_WS[goes]] = new.rows_LS[layer, at_WS]
    return Layout(expert_LS, rows_LS, worker_S)


def _incidence(layout: Layout, n_experts: int, n_workers: int) -> NDArray[np.float32]:
    """[L, E, W]: 1 where the worker holds the expert."""
    has = np.zeros((len(layout.expert_LS), n_experts, n_workers), np.float32)
    layers, slots = np.nonzero(layout.expert_LS >= 0)
    has[layers, layout.expert_LS[layers, slots], layout.worker_S[slots]] = 1
    return has


def _assign(overlap_NN: NDArray[np.float32]) -> Ints:
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
