"""A layout made better in few moves: the busiest worker of a layer exchanges an expert with another.

Legend: L layers, S slots of a layer, W workers, C slots of one worker.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.layout import Floats, Layout

_TRIED = 4  # of the workers with the least to do, before a layer is left as it is


def swap(layout: Layout, speed_W: Floats, target_L: Floats) -> Layout:
    """Exchange pieces between the busiest worker of a layer and one with little to do, until no worker takes longer
    than `target_L` or no exchange helps; the rows of a piece go with it."""
    expert_LS, rows_LS, worker_S = layout.expert_LS.copy(), layout.rows_LS.copy(), layout.worker_S
    n_layers, n_workers = len(expert_LS), len(speed_W)
    slots_W = np.bincount(worker_S, minlength=n_workers)
    first_W, width = np.searchsorted(worker_S, np.arange(n_workers)), int(slots_W.max())
    at_C = np.arange(width)
    time_LW = layout.times(speed_W)
    rank_L = np.zeros(n_layers, np.int64)  # how many of the least busy workers had nothing to exchange
    active = np.arange(n_layers)
    for _ in range(8 * n_workers):
        order = np.argsort(time_LW[active], axis=1, kind="stable")
        high = order[:, -1]
        largest = time_LW[active, high]
        open_ = (largest > target_L[active]) & (rank_L[active] < min(_TRIED, n_workers - 1))
        if not open_.any():
            break
        active, order, high, largest = active[open_], order[open_], high[open_], largest[open_]
        low = order[np.arange(len(active)), rank_L[active]]
        from_C = np.minimum(first_W[high][:, None] + at_C, len(worker_S) - 1)
        to_C = np.minimum(first_W[low][:, None] + at_C, len(worker_S) - 1)
        exists_from = at_C < slots_W[high][:, None]
        exists_to = at_C < slots_W[low][:, None]
        layer = active[:, None]
        mine, yours = expert_LS[layer, from_C], expert_LS[layer, to_C]
        moved = rows_LS[layer, from_C][:, :, None] - rows_LS[layer, to_C][:, None, :]
        # Neither may have what it gets already.
        fits_from = exists_from & (mine >= 0) & ~(mine[:, :, None] == yours[:, None, :]).any(2)
        fits_to = exists_to & ~((yours[:, :, None] == mine[:, None, :]).any(2) & (yours >= 0))
        after_high = largest[:, None, None] - moved / speed_W[high][:, None, None]
        after_low = time_LW[active, low][:, None, None] + moved / speed_W[low][:, None, None]
        after = np.maximum(after_high, after_low)
        after[~(fits_from[:, :, None] & fits_to[:, None, :])] = np.inf
        best = after.reshape(len(active), -1).argmin(1)
        i, j = best // width, best % width
        row = np.arange(len(active))
        helps = after[row, i, j] < largest * (1 - 1e-6)
        rank_L[active[~helps]] += 1
        layers, source, target = active[helps], from_C[row, i][helps], to_C[row, j][helps]
        for values in (expert_LS, rows_LS):
            values[layers, source], values[layers, target] = values[layers, target], values[layers, source]
        given = moved[row, i, j][helps]
        time_LW[layers, high[helps]] -= given / speed_W[high[helps]]
        time_LW[layers, low[helps]] += given / speed_W[low[helps]]
        rank_L[layers] = 0
    return Layout(expert_LS, rows_LS, worker_S)
