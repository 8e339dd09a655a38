"""The placement: which expert workers hold which expert, immutable and numbered by an epoch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

Homes = Mapping[str, float]  # the workers that hold an expert, each with its share of the expert's rows


class Replica(NamedTuple):
    """One copy of an expert."""

    worker: str
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`workers[replicas[layer][expert][i]]` holds replica i of expert `expert` of layer `layer`.

    A layer without experts has none here; all others have as many.

    `shares[layer][expert][i]` is the part of the expert's rows that replica i is to get; those of an expert add up
    to 1. None: all replicas of an expert get the same.
    """

    epoch: int
    workers: tuple[str, ...]
    replicas: tuple[tuple[tuple[int, ...], ...], ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    pins: frozenset[Replica] = frozenset()  # replicas that stay where they are, whatever is planned

    @classmethod
    def of(
        cls,
        epoch: int,
        workers: Iterable[str],
        homes_LE: Sequence[Sequence[Homes]],
        pins: frozenset[Replica] = frozenset(),
    ) -> Self:
        """From the homes of each expert. Shares are scaled to add up to 1; equal ones where all are 0."""
        names = tuple(workers)
        index = {worker: i for i, worker in enumerate(names)}
        replicas, shares = [], []
        for experts in homes_LE:
            ordered = [sorted((index[worker], share) for worker, share in homes.items()) for homes in experts]
            replicas.append(tuple(tuple(i for i, _ in homes) for homes in ordered))
            shares.append(tuple(_scaled([share for _, share in homes]) for homes in ordered))
        return cls(epoch, names, tuple(replicas), tuple(shares), pins)

    @property
    def n_layers(self) -> int:
        return len(self.replicas)

    @property
    def n_experts(self) -> int:
        """Experts of a layer that has any."""
        return max(map(len, self.replicas), default=0)

    def share(self, layer: int, expert: int) -> tuple[float, ...]:
        """The shares of the replicas of `(layer, expert)`, in the order of `replicas`."""
        n = len(self.replicas[layer][expert])
        return (1 / n,) * n if self.shares is None else self.shares[layer][expert]

    def holders(self, layer: int, expert: int) -> tuple[str, ...]:
        """The workers that hold `(layer, expert)`, in a fixed order."""
        return tuple(self.workers[index] for index in self.replicas[layer][expert])

    def homes(self) -> list[list[dict[str, float]]]:
        """By layer and expert, the workers that hold it and their shares: for whoever makes the next placement."""
        return [
            [
                dict(zip(self.holders(layer, expert), self.share(layer, expert), strict=True))
                for expert in range(len(self.replicas[layer]))
            ]
            for layer in range(self.n_layers)
        ]

    @property
    def holding(self) -> frozenset[str]:
        """The workers that hold any expert: one of `workers` that was emptied does not."""
        return frozenset(self.workers[i] for i in {i for experts in self.replicas for held in experts for i in held})

    def shard(self, worker: str) -> tuple[tuple[int, int], ...]:
        """The `(layer, expert)` pairs that `worker` holds, ascending; none for a worker that is not in it."""
        if worker not in self.workers:
            return ()
        index = self.workers.index(worker)
        return tuple(
            (layer, expert)
            for layer, experts in enumerate(self.replicas)
            for expert, holders in enumerate(experts)
            if index in holders
        )

    def all_replicas(self) -> frozenset[Replica]:
        """Every copy."""
        return frozenset(
            Replica(self.workers[index], layer, expert)
            for layer, experts in enumerate(self.replicas)
            for expert, holders in enumerate(experts)
            for index in holders
        )

    def only(self, layers: Sequence[int]) -> Placement:
        """The same of `layers` alone, in this order; -1 stands for a layer without experts."""
        replicas = tuple(self.replicas[layer] if layer >= 0 else () for layer in layers)
        shares = None if self.shares is None else tuple(self.shares[layer] if layer >= 0 else () for layer in layers)
        at = {layer: i for i, layer in enumerate(layers) if layer >= 0}
        pins = frozenset(pin._replace(layer=at[pin.layer]) for pin in self.pins if pin.layer in at)
        return replace(self, replicas=replicas, shares=shares, pins=pins)

    def numbered(self, epoch: int) -> Placement:
        """The same placement under another epoch."""
        return replace(self, epoch=epoch)


def _scaled(shares: Sequence[float]) -> tuple[float, ...]:
    total = sum(shares)
    if total == math.inf:  # too large for a float, which each of them is not
        return _scaled([share / max(shares) for share in shares])
    return tuple(share / total for share in shares) if total > 0 else tuple(1 / len(shares) for _ in shares)


def striped(
    n_layers: int,
    n_experts: int,
    workers: Sequence[str],
    epoch: int = 1,
    dense_layers: Collection[int] = (),
    spares: int = 0,
) -> Placement:
    """One replica each, dealt out like cards: expert e of layer l goes to worker (e + l) mod N.

    The shift by layer keeps a worker from holding the same expert index everywhere, so that N which does not divide
    the number of experts still gives shards within one replica of each other over all layers. The `dense_layers` have
    no experts.

    spares: further replicas of each expert, fewer than there are workers, which get rows when the first one is lost.
    Those of a worker's experts are dealt out over all the others, so that a loss burdens each of them a little.
    """
    n = len(workers)

    def homes(layer: int, expert: int) -> dict[str, float]:
        first = (expert + layer) % n
        turn = expert // n + layer
        others = ((first + 1 + (turn + spare) % (n - 1)) % n for spare in range(spares))
        return {workers[first]: 1.0} | {workers[other]: 0.0 for other in others}

    return Placement.of(
        epoch,
        workers,
        [
            [homes(layer, expert) for expert in range(0 if layer in dense_layers else n_experts)]
            for layer in range(n_layers)
        ],
    )
