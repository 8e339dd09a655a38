"""The placement: which expert workers hold which expert, immutable and numbered by an epoch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """`workers[replicas[layer][expert][i]]` holds replica i of expert `expert` of layer `layer`.

    A layer without experts has none here; all others have as many.
    """

    epoch: int
    workers: tuple[str, ...]
    replicas: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def n_experts(self) -> int:
        """Of a layer that has any."""
        return max(map(len, self.replicas), default=0)

    def holders(self, layer: int, expert: int) -> tuple[str, ...]:
        """The workers that hold `(layer, expert)`, in a fixed order."""
        return tuple(self.workers[index] for index in self.replicas[layer][expert])

    def shard(self, worker: str) -> tuple[tuple[int, int], ...]:
        """The `(layer, expert)` pairs that `worker` holds, ascending."""
        index = self.workers.index(worker)
        return tuple(
            (layer, expert)
            for layer, experts in enumerate(self.replicas)
            for expert, holders in enumerate(experts)
            if index in holders
        )


def striped(
    n_layers: int, n_experts: int, workers: Sequence[str], epoch: int = 1, dense_layers: Collection[int] = ()
) -> Placement:
    """One replica each, dealt out like cards: expert e of layer l goes to worker (e + l) mod N.

    The shift by layer keeps a worker from holding the same expert index everywhere, so that N which does not divide
    the number of experts still gives shards within one replica of each other over all layers. The `dense_layers` have
    no experts.
    """
    n = len(workers)
    replicas = tuple(
        tuple(((expert + layer) % n,) for expert in range(0 if layer in dense_layers else n_experts))
        for layer in range(n_layers)
    )
    return Placement(epoch=epoch, workers=tuple(workers), replicas=replicas)
