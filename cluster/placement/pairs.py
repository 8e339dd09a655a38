"""Slots of workers that have two of them for a layer, filled by twos: a third way beside those of `layout`.

With two slots a worker's rows are those of two experts. From the largest expert on, each gets the largest partner that
fits beside it; one beside which none fits is cut over as few workers as can be, which costs a slot no more than leaving
one empty would.

Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from cluster.placement.layout import FREE, Floats, Ints, Layout

_TRIES = 10  # halvings of the interval in which the largest time lies

Piece = tuple[int, float]  # an expert, and the rows of it that are computed here


def pair_up(loads_LE: Floats, worker_S: Ints, largest_L: Floats) -> Layout:
    """The layout by pairs; workers are equal and have two slots each. largest_L: what another way needs; a layer for
    which this one is not better is left empty."""
    n_layers, n_workers = len(loads_LE), len(worker_S) // 2
    expert_LS: Ints = np.full((n_layers, len(worker_S)), FREE)
    rows_LS: Floats = np.zeros((n_layers, len(worker_S)))
    for layer, load_E in enumerate(loads_LE):
        order_E = np.argsort(load_E, kind="stable")
        ids, loads = order_E.tolist(), load_E[order_E].tolist()
        low, high = load_E.sum() / n_workers, float(largest_L[layer])
        found: list[list[Piece]] = []
        for _ in range(_TRIES):
            time = (low + high) / 2
            tried = _filled(ids, loads, time, n_workers)
            low, high, found = (time, high, found) if tried is None else (low, time, tried)
        found = _evened(found)
        for worker, pieces in enumerate(found):
            for slot, (expert, rows) in enumerate(pieces, 2 * worker):
                expert_LS[layer, slot], rows_LS[layer, slot] = expert, rows
    return Layout(expert_LS, rows_LS, worker_S)


def _filled(ids_E: list[int], loads_E: list[float], time: float, n_workers: int) -> list[list[Piece]] | None:
    """The pieces of each worker, none above `time`; None where workers do not suffice. Loads ascend."""
    ids, loads = ids_E.copy(), loads_E.copy()
    workers: list[list[Piece]] = []
    while loads:
        if len(workers) >= n_workers:
            return None
        expert, left = ids.pop(), loads.pop()
        partner = bisect_right(loads, time - left) - 1
        if partner >= 0 or (not loads and left <= time):
            others = [(ids.pop(partner), loads.pop(partner))] if partner >= 0 else []
            workers.append([(expert, left), *others])
            continue
        # So many workers that with the smallest partners there is time for all of it; then larger ones where they fit.
        least = list(accumulate(loads, initial=0.0))
        n = next((n for n in range(2, len(loads) + 1) if n * time - least[n] >= left), 0)
        if not n:
            return None
        spare = n * time - left
        for others_left in range(n - 1, -1, -1):
            at = max(others_left, bisect_right(loads, spare - sum(loads[:others_left])) - 1)
            spare -= loads[at]
            rows = min(left, time - loads[at])
            left -= rows
            workers.append([(expert, rows), (ids.pop(at), loads.pop(at))])
        if left > 1e-6 * time:
            return None
    return workers if len(workers) <= n_workers else None


def _evened(workers: list[list[Piece]]) -> list[list[Piece]]:
    """The same pieces, the largest beside the smallest: no pair above the largest there was, and the others far below,
    so that loads may drift a while. As it was where an expert would meet itself."""
    pieces = sorted((piece for pair in workers for piece in pair), key=lambda piece: piece[1])
    pieces = [(FREE, 0.0)] * (2 * len(workers) - len(pieces)) + pieces
    pairs = list(zip(pieces[: len(workers)], reversed(pieces[len(workers) :]), strict=True))
    if any(a[0] == b[0] != FREE for a, b in pairs):
        return workers
    return [[piece for piece in pair if piece[0] != FREE] for pair in pairs]
