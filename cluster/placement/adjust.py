"""The present homes with as many replicas of each expert as a new layout has, in few moves.

Legend: L layers, E experts of a layer, W workers.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.homes import Rules, layout_of, replicas
from cluster.placement.layout import Floats, Ints, Layout


def adjust(present: Layout, counts_LE: Ints, loads_LE: Floats, speed_W: Floats, rules: Rules) -> Layout:
    """Take replicas away where an expert has more than `counts_LE`, from its busiest home, and give them where it has
    fewer, to the worker with the least to do. Rows are not divided any more."""
    n_workers = len(speed_W)
    has_LEW = replicas(present, loads_LE.shape[1], n_workers)
    slots_W = np.bincount(present.worker_S, minlength=n_workers)
    for has_EW, wanted_E, load_E, pinned_EW in zip(has_LEW, counts_LE, loads_LE, rules.pinned_LEW, strict=True):
        each_E = load_E / wanted_E.clip(1)
        time_W = (each_E @ has_EW) / speed_W
        surplus_E = has_EW.sum(1) - wanted_E
        for expert in np.flatnonzero(surplus_E > 0).tolist():
            homes = np.flatnonzero(has_EW[expert] & ~pinned_EW[expert])
            leaving = homes[np.argsort(-time_W[homes], kind="stable")][: surplus_E[expert]]
            has_EW[expert, leaving] = False
            time_W[leaving] -= each_E[expert] / speed_W[leaving]
        free_W = slots_W - has_EW.sum(0)
        wanting = np.repeat(np.arange(len(load_E)), (-surplus_E).clip(0))
        for expert in wanting[np.argsort(-each_E[wanting], kind="stable")].tolist():
            able_W = (free_W > 0) & ~has_EW[expert]
            if not able_W.any():
                continue
            home = int(np.where(able_W, time_W, np.inf).argmin())
            has_EW[expert, home] = True
            free_W[home] -= 1
            time_W[home] += each_E[expert] / speed_W[home]
    return layout_of(has_LEW, present.worker_S, loads_LE, rules)
