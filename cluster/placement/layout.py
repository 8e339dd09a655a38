"""Which expert is in which slot of a layer: two ways to fill them, for all layers at once.

A slot belongs to a worker; each holds one expert or none (-1) and computes some of that expert's rows. Ways:

- `replicate_and_pack`: replicas go one by one to the expert with the most rows for each of its replicas, and replicas,
  largest first, to the worker with the least to do that has a slot left: greedy, good where slots are scarce.
- `fill_exactly`: workers are filled one after another to the same time, each with that many neighbours in the order of
  size which just suffice, of which the last is cut and its rest put back: the sliding window of Shachnai and Tamir
  ("On two class-constrained versions of the multiple knapsack problem", Algorithmica 29, 2001), exact where slots
  suffice for the cuts.

Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FREE = -1


class Layout(NamedTuple):
    """The slots of each layer."""

    expert_LS: Ints  # FREE, or the expert in the slot; on one worker an expert is in one slot at most
    rows_LS: Floats  # rows of that expert which are computed there
    worker_S: Ints  # whose slot it is, ascending

    def times(self, speed_W: Floats) -> Floats:
        """What each worker takes for each layer, in rows by speed: [L, W]."""
        n_layers, n_workers = len(self.expert_LS), len(speed_W)
        at_LS = self.worker_S + n_workers * np.arange(n_layers)[:, None]
        sums = np.bincount(at_LS.ravel(), self.rows_LS.ravel(), minlength=n_layers * n_workers)
        return sums.reshape(n_layers, n_workers) / speed_W


def replicate_and_pack(loads_LE: Floats, worker_S: Ints, speed_W: Floats, least: int = 1) -> Layout:
    """Greedy; every expert gets `least` slots, of which one may be missing where slots are few. S >= least * E."""
    n_layers, n_experts = loads_LE.shape
    n_slots, n_workers = len(worker_S), len(speed_W)
    layer_L = np.arange(n_layers)
    count_LE = np.full((n_layers, n_experts), least)
    expert_LS: Ints = np.full((n_layers, n_slots), FREE)
    expert_LS[:, : least * n_experts] = np.tile(np.arange(n_experts), least)
    each_LE = loads_LE / least
    for slot in range(least * n_experts, n_slots):
        most_L = each_LE.argmax(1)
        worth_L = each_LE[layer_L, most_L] > 0
        expert_LS[worth_L, slot] = most_L[worth_L]
        count_LE[layer_L, most_L] += worth_L
        each_LE[layer_L, most_L] = loads_LE[layer_L, most_L] / count_LE[layer_L, most_L]
        each_LE[layer_L, most_L] *= count_LE[layer_L, most_L] < n_workers
    piece_LE = loads_LE / count_LE
    size_LS = np.where(expert_LS >= 0, np.take_along_axis(piece_LE, expert_LS.clip(0), 1), -1.0)
    order_LS = np.argsort(-size_LS, axis=1, kind="stable")
    expert_LS, size_LS = np.take_along_axis(expert_LS, order_LS, 1), np.take_along_axis(size_LS, order_LS, 1)
    return _pack(expert_LS, size_LS, worker_S, speed_W)


def _pack(expert_LS: Ints, size_LS: Floats, worker_S: Ints, speed_W: Floats) -> Layout:
    """Pieces in the given order, each to the worker that is done first, with a slot left and without that expert."""
    n_layers, n_slots = expert_LS.shape
    n_workers = len(speed_W)
    layer_L = np.arange(n_layers)
    first_W = np.searchsorted(worker_S, np.arange(n_workers))
    free_LW = np.tile(np.bincount(worker_S, minlength=n_workers), (n_layers, 1))
    time_LW = np.zeros((n_layers, n_workers))
    has_LEW = np.zeros((n_layers, expert_LS.max() + 1, n_workers), bool)
    out_LS, rows_LS = np.full((n_layers, n_slots), FREE), np.zeros((n_layers, n_slots))
    filled_LW = np.zeros((n_layers, n_workers), np.int64)
    for piece in range(n_slots):
        expert_L, size_L = expert_LS[:, piece], size_LS[:, piece]
        if (expert_L < 0).all():
            break
        after_LW = time_LW + size_L[:, None].clip(0) / speed_W
        after_LW[free_LW <= 0] = np.inf
        taken_LW = has_LEW[layer_L, expert_L.clip(0)]
        worker_L = np.where(taken_LW, np.inf, after_LW).argmin(1)
        # Where only workers with that very expert are left, the piece is not needed: it stays out.
        put_L = (expert_L >= 0) & ~taken_LW[layer_L, worker_L] & (free_LW[layer_L, worker_L] > 0)
        layers, workers = layer_L[put_L], worker_L[put_L]
        slots = first_W[workers] + filled_LW[layers, workers]
        out_LS[layers, slots], rows_LS[layers, slots] = expert_L[put_L], size_L[put_L]
        time_LW[layers, workers] += size_L[put_L] / speed_W[workers]
        filled_LW[layers, workers] += 1
        free_LW[layers, workers] -= 1
        has_LEW[layers, expert_L[put_L], workers] = True
    return Layout(out_LS, rows_LS, worker_S)


def fill_exactly(loads_LE: Floats, worker_S: Ints, speed_W: Floats, time_L: Floats) -> tuple[Layout, NDArray[np.bool_]]:
    """Fill every worker to `time_L`; also whether all rows and all experts of a layer found a place."""
    n_layers, n_experts = loads_LE.shape
    slots_W = np.bincount(worker_S, minlength=len(speed_W))
    out_LS, rows_LS = np.full((n_layers, len(worker_S)), FREE), np.zeros((n_layers, len(worker_S)))
    layer_L1 = np.arange(n_layers)[:, None]
    id_LE: Ints = np.argsort(loads_LE, axis=1, kind="stable")
    rest_LE: Floats = np.take_along_axis(loads_LE, id_LE, 1)
    here_LE: NDArray[np.bool_] = np.ones((n_layers, n_experts), bool)  # sorted: those with something left come first
    slot = 0
    for n_slots, speed in zip(slots_W.tolist(), speed_W.tolist(), strict=True):
        n_L = here_LE.sum(1)
        cap_L = time_L * speed
        sums_LE = np.zeros((n_layers, n_experts + 1))
        np.cumsum(np.where(here_LE, rest_LE, 0.0), axis=1, out=sums_LE[:, 1:])
        # The first window of n_slots neighbours that fills the worker; without one, the largest.
        width = min(n_slots, n_experts)
        windows_LE = sums_LE[:, width:] - sums_LE[:, : n_experts + 1 - width]
        starts = np.arange(windows_LE.shape[1])
        too_little_LE = (windows_LE < cap_L[:, None] * (1 - 1e-12)) & (starts <= n_L[:, None] - width)
        window_L = too_little_LE.sum(1)
        begin_L = np.minimum(window_L, (n_L - width).clip(0))
        end_L = np.minimum(begin_L + width, n_L)
        # The first few may be too much already: then fewer, from the smallest on.
        fits_L = ((sums_LE[:, 1:] < cap_L[:, None] * (1 - 1e-12)) & here_LE).sum(1) + 1
        end_L = np.where(begin_L == 0, np.minimum(end_L, fits_L), end_L)
        taken_L = sums_LE[layer_L1[:, 0], end_L] - sums_LE[layer_L1[:, 0], begin_L]
        excess_L = (taken_L - cap_L).clip(0)
        excess_L[excess_L <= 1e-12 * cap_L] = 0
        for k in range(width):
            at_L = begin_L + k
            put_L = at_L < end_L
            layers, at = layer_L1[put_L, 0], at_L[put_L]
            last_L = (at_L == end_L - 1)[put_L]
            left = np.where(last_L, excess_L[put_L], 0.0)
            out_LS[layers, slot + k] = id_LE[layers, at]
            rows_LS[layers, slot + k] = rest_LE[layers, at] - left
            rest_LE[layers, at] = left
            here_LE[layers, at] = left > 0
        slot += n_slots
        order_LE = np.argsort(np.where(here_LE, rest_LE, np.inf), axis=1, kind="stable")
        id_LE, rest_LE = np.take_along_axis(id_LE, order_LE, 1), np.take_along_axis(rest_LE, order_LE, 1)
        here_LE = np.take_along_axis(here_LE, order_LE, 1)
    complete_L: NDArray[np.bool_] = np.logical_not(here_LE.any(1))
    return Layout(out_LS, rows_LS, worker_S), complete_L
