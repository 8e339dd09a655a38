"""How the rows of replicated experts are best divided between the homes they have.

The rows that minimise the sum of squares of the workers' times also minimise the largest time (Fujishige,
"Lexicographically optimal base of a polymatroid", 1980), and dividing one expert after another, each as water finds its
level in its homes, leads there.

Legend: L layers, E experts of a layer, S slots of a layer, W workers, K replicated experts of a layer, R homes of one.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.layout import Floats, Ints, Layout

_SWEEPS = 80
_RELAXATION = 1.5
_ENOUGH = 1e-4  # relative: a sweep that lowers no layer's largest time by more ends it
_WORTH = 1e-2  # relative: what sweeps that do not go too far have to gain, since they leave spares a few rows


def divide(loads_LE: Floats, layout: Layout, speed_W: Floats) -> Layout:
    """The same slots with the rows of every expert divided anew: the largest time of each layer becomes least."""
    expert_LS, worker_S = layout.expert_LS, layout.worker_S
    rows_LS, homes = equally(loads_LE, expert_LS), _homes(loads_LE, expert_LS)
    # Going too far gets many experts faster to where they belong, and a few to and fro beside it.
    rows_LS = _swept(loads_LE, Layout(expert_LS, rows_LS, worker_S), speed_W, homes, _RELAXATION)
    exact_LS = _swept(loads_LE, Layout(expert_LS, rows_LS, worker_S), speed_W, homes, 1.0)
    largest_L, exact_L = (Layout(expert_LS, rows, worker_S).times(speed_W).max(1) for rows in (rows_LS, exact_LS))
    better_L1 = (exact_L < largest_L * (1 - _WORTH))[:, None]
    return Layout(expert_LS, np.where(better_L1, exact_LS, rows_LS).clip(0), worker_S)


def _swept(loads_LE: Floats, layout: Layout, speed_W: Floats, homes: tuple[Ints, Ints], relaxation: float) -> Floats:
    """The rows of each slot after sweeps over all replicated experts, until one lowers no layer's largest time."""
    n_layers = len(loads_LE)
    slot_LKR, expert_LK = homes
    worker_S, rows_LS = layout.worker_S, layout.rows_LS.copy()
    time_LW = layout.times(speed_W)
    layer_L1 = np.arange(n_layers)[:, None]
    largest_L = time_LW.max(1)
    for _ in range(_SWEEPS):
        for k in range(slot_LKR.shape[1]):
            slot_LR = slot_LKR[:, k]
            exists_LR = slot_LR >= 0
            slots = slot_LR.clip(0)
            worker_LR = worker_S[slots]
            speed_LR = np.where(exists_LR, speed_W[worker_LR], 0.0)
            old_LR = np.where(exists_LR, rows_LS[layer_L1, slots], 0.0)
            base_LR = np.where(exists_LR, time_LW[layer_L1, worker_LR] - old_LR / speed_W[worker_LR], np.inf)
            rows_L = np.where(expert_LK[:, k] >= 0, loads_LE[layer_L1[:, 0], expert_LK[:, k].clip(0)], 0.0)
            new_LR = _fill(rows_L, base_LR, speed_LR)
            new_LR = (old_LR + relaxation * (new_LR - old_LR)).clip(0)
            new_LR *= (rows_L / new_LR.sum(1).clip(1e-300))[:, None]
            layers, which = np.nonzero(exists_LR)
            changed = (new_LR - old_LR)[layers, which]
            rows_LS[layers, slot_LR[layers, which]] += changed
            time_LW[layers, worker_LR[layers, which]] += changed / speed_LR[layers, which]
        before_L, largest_L = largest_L, time_LW.max(1)
        if (largest_L >= before_L * (1 - _ENOUGH)).all():
            break
    return rows_LS


def _fill(rows_L: Floats, base_LR: Floats, speed_LR: Floats) -> Floats:
    """Divide `rows_L` between homes that are busy until `base_LR`, so that those with a part end together."""
    order_LR = np.argsort(base_LR, axis=1, kind="stable")
    base = np.take_along_axis(base_LR, order_LR, 1)
    speed = np.take_along_axis(speed_LR, order_LR, 1)
    finite = np.where(speed > 0, base, 0.0)
    speeds, work = speed.cumsum(1), (finite * speed).cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = (rows_L[:, None] + work) / speeds  # the level if the first so many homes take part
    n_L = ((speed > 0) & (base < level)).sum(1).clip(1)  # as many as lie below the level that they make
    level_L1 = np.take_along_axis(level, n_L[:, None] - 1, 1)
    filled = np.where(speed > 0, (level_L1 - finite).clip(0) * speed, 0.0)
    out = np.empty_like(filled)
    np.put_along_axis(out, order_LR, filled, 1)
    return out


def equally(loads_LE: Floats, expert_LS: Ints) -> Floats:
    """The rows of each slot, [L, S], when all homes of an expert get the same."""
    held_LS = expert_LS >= 0
    count_LE = counts(expert_LS, loads_LE.shape[1])
    each_LE = loads_LE / count_LE.clip(1)
    return np.where(held_LS, np.take_along_axis(each_LE, expert_LS.clip(0), 1), 0.0)


def counts(expert_LS: Ints, n_experts: int) -> Ints:
    """How many slots each expert has, [L, E]."""
    n_layers = len(expert_LS)
    at = expert_LS + 1 + (n_experts + 1) * np.arange(n_layers)[:, None]
    slots = np.bincount(at.ravel(), minlength=n_layers * (n_experts + 1))
    return slots.reshape(n_layers, n_experts + 1)[:, 1:]


def _homes(loads_LE: Floats, expert_LS: Ints) -> tuple[Ints, Ints]:
    """Slots of each layer's replicated experts, most rows first: [L, K, R] and the experts [L, K]; -1 where none."""
    n_layers, n_experts = loads_LE.shape
    count_LE = counts(expert_LS, n_experts)
    n_replicated, n_homes = int((count_LE > 1).sum(1).max(initial=0)), int(count_LE.max(initial=0))
    slot_LKR = np.full((n_layers, n_replicated, n_homes), -1)
    expert_LK = np.full((n_layers, n_replicated), -1)
    for layer in range(n_layers):
        replicated = np.flatnonzero(count_LE[layer] > 1)
        replicated = replicated[np.argsort(-loads_LE[layer, replicated], kind="stable")]
        for k, expert in enumerate(replicated.tolist()):
            slots = np.flatnonzero(expert_LS[layer] == expert)
            slot_LKR[layer, k, : len(slots)] = slots
            expert_LK[layer, k] = expert
    return slot_LKR, expert_LK
