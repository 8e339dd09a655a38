"""Which processes there are to be, and what an operator said of them: known to every member. Pure.

It travels in the view, so that a controller that was restarted gets it back from the members as it gets the placement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.control.autoscale import Limits
from cluster.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Processes:
    """Expert workers and routers by id; gateways are Ray Serve's, which names them itself."""

    workers: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    gateways: int = 0

    @property
    def ids(self) -> frozenset[str]:
        """Of expert workers and routers."""
        return frozenset((*self.workers, *self.routers))

    def __or__(self, other: Processes) -> Processes:
        """Those of either."""
        return Processes(
            _ordered({*self.workers, *other.workers}),
            _ordered({*self.routers, *other.routers}),
            max(self.gateways, other.gateways),
        )

    def resized(
        self,
        workers: int | None = None,
        routers: int | None = None,
        gateways: int | None = None,
        drained: Collection[str] = (),
    ) -> Processes:
        """As many of each; None: as many as now. `drained` workers leave first, then the ones with the highest numbers;
        new ones get higher ones."""
        return Processes(
            self.workers if workers is None else _resized("expert", self.workers, workers, drained),
            self.routers if routers is None else _resized("router", self.routers, routers),
            self.gateways if gateways is None else gateways,
        )

    def __str__(self) -> str:
        counts = ((len(self.workers), "expert worker"), (len(self.routers), "router"), (self.gateways, "gateway"))
        return ", ".join(f"{n} {noun}{'' if n == 1 else 's'}" for n, noun in counts if n)


_NOBODY = Processes()


@dataclass(frozen=True, slots=True)
class Scaling:
    """A change of the processes that is under way: a controller that is restarted in the middle goes on with it."""

    before: Processes  # what is in force again when it fails
    after: Processes


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the autoscaler may go."""

    routers: Limits
    workers: Limits


@dataclass(frozen=True, slots=True)
class Goal:
    """What the controller brings about. `revision` rises with each change."""

    revision: int = 0
    processes: Processes = _NOBODY  # those that are to run; while more are made of them or fewer, all of both
    scaling: Scaling | None = None
    leaving: frozenset[str] = frozenset()  # routers that finish what they have and take nothing new
    drained: frozenset[str] = frozenset()  # expert workers that are to hold nothing
    ending: frozenset[str] = frozenset()  # nodes that end: expert workers there are to hold nothing, but do elsewhere
    bounds: Bounds | None = None  # None: those of the start

    @property
    def n_holding(self) -> int:
        """Expert workers that hold experts once a scaling that is under way is done."""
        processes = self.processes if self.scaling is None else self.scaling.after
        return len(set(processes.workers) - self.drained)


NO_GOAL = Goal()


def check_resized(now: Processes, then: Processes, has_experts: bool) -> None:
    """PlacementError unless a cluster of `now` can become one of `then`; `has_experts`: whether its model has any."""
    if not now.workers and then.workers:
        raise PlacementError("this cluster has no expert workers that could become more")
    if now.workers and not then.workers:
        raise PlacementError("there has to be at least one expert worker")
    if not then.routers or not then.gateways:
        raise PlacementError("there have to be at least one router and one gateway")
    if has_experts and not now.workers and len(then.routers) > 1:
        raise PlacementError("without expert workers the one router holds all experts: there cannot be several")


def number(process: str) -> int:
    """N of `expert-N` or `router-N`."""
    return int(process.rpartition("-")[2])


def _ordered(processes: set[str]) -> tuple[str, ...]:
    return tuple(sorted(processes, key=number))


def _resized(kind: str, now: Sequence[str], n: int, unwanted: Collection[str] = ()) -> tuple[str, ...]:
    kept = sorted(now, key=lambda process: (process in unwanted, number(process)))[:n]
    first = max(map(number, now), default=-1) + 1
    return (*_ordered(set(kept)), *(f"{kind}-{first + i}" for i in range(n - len(now))))
