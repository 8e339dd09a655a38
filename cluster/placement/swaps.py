"""A layout made better in few moves: workers that take too long exchange experts with others.

Legend: L layers, E experts of a layer, S slots of a layer, W workers, C slots of one worker.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.layout import FREE, Floats, Ints, Layout
from cluster.placement.shares import counts, divide

_ROUNDS = 4  # of exchanging, then dividing rows anew: an expert's rows follow the room that its homes have won
_EVENNESS = 1e-3  # weight of how even the two are afterwards: decides between exchanges that gain as much


def swap(layout: Layout, loads_LE: Floats, speed_W: Floats, target_L: Floats) -> Layout:
    """Exchange experts between the workers of a layer until none takes longer than `target_L`, or none helps; the rows
    of replicated experts are divided anew. A layer whose experts have too few homes for `target_L` stays as it is."""
    expert_LS, rows_LS = layout.expert_LS.copy(), layout.rows_LS.copy()
    left = np.flatnonzero(_may_fit(layout, loads_LE, speed_W, target_L))
    for _ in range(_ROUNDS):
        here = Layout(expert_LS[left], rows_LS[left], layout.worker_S)
        left = left[here.times(speed_W).max(1) > target_L[left]]
        if not len(left):
            break
        swapped = _exchange(Layout(expert_LS[left], rows_LS[left], layout.worker_S), speed_W, target_L[left])
        changed = (swapped.expert_LS != expert_LS[left]).any(1)
        left = left[changed]
        divided = divide(loads_LE[left], Layout(swapped.expert_LS[changed], rows_LS[left], layout.worker_S), speed_W)
        expert_LS[left], rows_LS[left] = divided.expert_LS, divided.rows_LS
    return Layout(expert_LS, rows_LS, layout.worker_S)


def _may_fit(layout: Layout, loads_LE: Floats, speed_W: Floats, target_L: Floats) -> Ints:
    """Whether each expert has homes enough, as far as their number says it: [L], bool."""
    room_LE = counts(layout.expert_LS, loads_LE.shape[1]) * (target_L[:, None] * speed_W.max())
    fits_L: Ints = (loads_LE <= room_LE).all(1)
    return fits_L


def _exchange(layout: Layout, speed_W: Floats, target_L: Floats) -> Layout:
    """One exchange after another in each layer: by the worker that is most above `target_L`, with whichever other
    leaves least time above it on both. The rows of a replica go with it."""
    expert_LS, rows_LS, worker_S = layout.expert_LS.copy(), layout.rows_LS.copy(), layout.worker_S
    n_layers, n_workers, n_slots = len(expert_LS), len(speed_W), len(worker_S)
    slots_W = np.bincount(worker_S, minlength=n_workers)
    first_W, at_C = np.searchsorted(worker_S, np.arange(n_workers)), np.arange(slots_W.max())
    has_LEW = np.zeros((n_layers, expert_LS.max() + 2, n_workers), bool)  # the last one is FREE: nobody has that
    layers, slots = np.nonzero(expert_LS != FREE)
    has_LEW[layers, expert_LS[layers, slots], worker_S[slots]] = True
    time_LW = layout.times(speed_W)
    done_LW = np.zeros((n_layers, n_workers), bool)  # those that nothing helps
    active = np.arange(n_layers)
    for _ in range(4 * n_workers):
        excess_LW = np.where(done_LW[active], 0.0, time_LW[active] - target_L[active, None])
        high = excess_LW.argmax(1)
        above = excess_LW[np.arange(len(active)), high] > 1e-12 * target_L[active]
        active, high = active[above], high[above]
        if not len(active):
            break
        row, layer = np.arange(len(active)), active[:, None]
        from_C = np.minimum(first_W[high][:, None] + at_C, n_slots - 1)
        mine, yours = expert_LS[layer, from_C], expert_LS[active]
        moved_CS = rows_LS[layer, from_C][:, :, None] - rows_LS[active][:, None, :]
        # Neither may have what it gets already.
        allowed_CS = ~has_LEW[layer, mine][:, :, worker_S] & ~has_LEW[layer, yours, high[:, None]][:, None, :]
        allowed_CS &= ((at_C < slots_W[high][:, None]) & (mine != FREE))[:, :, None]
        unit = 1 / target_L[active][:, None, None]  # times are by the target
        mine_before, yours_before = (
            time_LW[active, high][:, None, None] * unit,
            time_LW[active][:, None, worker_S] * unit,
        )
        mine_after = mine_before - moved_CS * unit / speed_W[high][:, None, None]
        yours_after = yours_before + moved_CS * unit / speed_W[worker_S]
        gain_CS = mine_before - 1 + (yours_before - 1).clip(0) - (mine_after - 1).clip(0) - (yours_after - 1).clip(0)
        allowed_CS &= gain_CS > 1e-9
        gain_CS += _EVENNESS * (mine_before**2 + yours_before**2 - mine_after**2 - yours_after**2)
        best = np.where(allowed_CS, gain_CS, -np.inf).reshape(len(active), -1).argmax(1)
        i, target = best // n_slots, best % n_slots
        helps = allowed_CS[row, i, target]
        done_LW[active[~helps], high[~helps]] = True
        layers, high, row, i, target = active[helps], high[helps], row[helps], i[helps], target[helps]
        source, low, given = from_C[row, i], worker_S[target], moved_CS[row, i, target]
        gone, come = expert_LS[layers, source], expert_LS[layers, target]
        has_LEW[layers, gone, high], has_LEW[layers, gone, low] = False, True
        has_LEW[layers, come, low], has_LEW[layers, come, high] = False, come != FREE
        for values in (expert_LS, rows_LS):
            values[layers, source], values[layers, target] = values[layers, target], values[layers, source]
        time_LW[layers, high] -= given / speed_W[high]
        time_LW[layers, low] += given / speed_W[low]
    return Layout(expert_LS, rows_LS, worker_S)
