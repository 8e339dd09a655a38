"""The series of the controller, read from what it knows: the fleet, the placement, and what was done about it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from cluster.control.autoscaler import Autoscaler
from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.rebalancer import Rebalancer
from cluster.control.view import State, View
from cluster.observe.exposition import Reading
from cluster.observe.series import controller as series
from cluster.placement.load import Load, imbalance
from cluster.placement.placement import Placement

_MODES = ("off", "advise", "auto")


class ControllerReadings:
    """A source of readings. The controller's event loop changes what a scrape's thread reads here: each value by itself
    is one that was true at that moment."""

    def __init__(
        self,
        membership: Membership,
        operator: Operator,
        rebalancer: Rebalancer,
        autoscaler: Autoscaler,
        expert_bytes: int,
        least_homes: int,
        per_expert: bool,
    ) -> None:
        """`expert_bytes`: of one replica. `least_homes`: replicas that each expert is to have. `per_expert`: whether
        there are series for each expert and layer."""
        self._membership = membership
        self._operator = operator
        self._rebalancer = rebalancer
        self._autoscaler = autoscaler
        self._expert_bytes = expert_bytes
        self._least_homes = least_homes
        self._per_expert = per_expert

    def __call__(self) -> Iterable[Reading]:
        view, load = self._membership.view, self._membership.load
        yield from _of_fleet(view)
        for process, n in self._membership.restarts.copy().items():
            yield Reading(series.RESTARTS, n, (process, role_of(process)))
        yield from self._of_placement(view)
        if load is not None:
            yield from self._of_load(load, view.placement)
        yield from self._of_actions()
        yield from self._of_rebalancer()
        yield from self._of_autoscaler()

    def _of_placement(self, view: View) -> Iterator[Reading]:
        placement = view.placement
        ready = {member.id for member in view.members if member.role == "expert" and member.state == "ready"}
        if not any(member.role == "expert" for member in view.members):  # routers hold their experts themselves
            ready = set(placement.workers)
        live: Counter[int] = Counter()  # experts by the number of their replicas on workers that are ready
        for layer, expert, homes in _homes(placement):
            n = sum(worker in ready for worker in homes)
            live[n] += 1
            if self._per_expert:
                labels = (str(layer), str(expert))
                yield Reading(series.REPLICAS, n, labels)
                yield from (Reading(series.HOME, share, (*labels, worker)) for worker, share in homes.items())
        yield Reading(series.EXPERTS, live.total())
        yield Reading(series.WITHOUT_REPLICA, live[0])
        yield Reading(series.WITHOUT_SPARE, live[1])
        least = min(self._least_homes, max(1, len(view.goal.processes.workers)))
        yield Reading(series.SPARES_WANTED, least - 1)
        yield Reading(series.SHORT_OF_SPARES, sum(live[n] for n in range(1, least)))
        yield Reading(series.ACKNOWLEDGED, float(view.acknowledged))

    def _of_load(self, load: Load, placement: Placement) -> Iterator[Reading]:
        yield Reading(series.IMBALANCE, load.imbalance)
        for worker, rows in load.recent.items():
            yield Reading(series.WORKER_WINDOW, rows, (worker,))
        for layer, rows_E in enumerate(load.recent_LE.tolist()):
            if placement.replicas[layer]:
                yield Reading(series.LAYER_IMBALANCE, imbalance(rows_E), (str(layer),))
                if self._per_expert:
                    each = enumerate(rows_E)
                    yield from (Reading(series.EXPERT_WINDOW, rows, (str(layer), str(e))) for e, rows in each)

    def _of_actions(self) -> Iterator[Reading]:
        tally = self._operator.tally
        for verb in sorted({*tally.done, *tally.failed}):
            yield Reading(series.ACTIONS, tally.done[verb], (verb, "done"))
            yield Reading(series.ACTIONS, tally.failed[verb], (verb, "failed"))
            yield Reading(series.ACTION_SECONDS, tally.seconds[verb], (verb,))
            yield Reading(series.MOVED_BYTES, tally.loaded[verb] * self._expert_bytes, (verb,))
        yield Reading(series.LAST_SUCCESS, tally.rebalanced_at)
        last = tally.rebalanced
        if last is not None and last.forecast is not None:
            yield Reading(series.FORECAST_GAIN, last.forecast.gain)
            if (since := last.realised(self._operator.total_rows)) is not None:
                yield Reading(series.REALIZED_GAIN, 1 - since / last.imbalance_before)

    def _of_rebalancer(self) -> Iterator[Reading]:
        health = self._rebalancer.health
        yield Reading(series.LAST_LOOK, health.looked or 0.0)
        yield Reading(series.ACTING, 0.0 if health.acting_since is None else time.time() - health.acting_since)
        yield Reading(series.FAILURES, health.failures)
        yield from (Reading(series.MODE, float(mode == health.mode), (mode,)) for mode in _MODES)

    def _of_autoscaler(self) -> Iterator[Reading]:
        health = self._autoscaler.health
        yield from (Reading(series.AUTOSCALE_TARGET, n, (role,)) for role, n in health.targets.copy().items())
        for role, signals in health.signals.copy().items():
            yield from (Reading(series.AUTOSCALE_LOAD, load, (role, signal)) for signal, load in signals.items())


def role_of(process: str) -> str:
    """`expert` of `expert-3`."""
    return process.rpartition("-")[0]


def _of_fleet(view: View) -> Iterator[Reading]:
    ready: Counter[str] = Counter()
    processes = view.goal.processes
    wanted = {"expert": len(processes.workers), "router": len(processes.routers), "gateway": processes.gateways}
    for member in view.members:
        ready[member.role] += member.state == "ready"
        for state in get_args(State):
            yield Reading(series.MEMBER_STATE, float(member.state == state), (member.id, member.role, state))
    for role, n in wanted.items():
        yield Reading(series.WANTED, n, (role,))
        yield Reading(series.READY, ready[role], (role,))


def _homes(placement: Placement) -> Iterator[tuple[int, int, dict[str, float]]]:
    for layer, experts in enumerate(placement.homes()):
        for expert, homes in enumerate(experts):
            yield layer, expert, homes
