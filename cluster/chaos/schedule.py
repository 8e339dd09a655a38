"""Which faults a running cluster gets, and when: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cluster.control.faults import Fault, Kind
from cluster.errors import ExpertMeshError

QUIET_S = (0.5, 4.0)  # between the end of one fault's recovery and the next fault
PAUSES_S = (0.2, 2.0, 0.0)  # short enough for nobody to notice, long enough for everybody to; 0: for good
LASTING_S = (2.0, 6.0)  # of a partition, or of a process that is slow


def draw(rng: random.Random, kinds: Sequence[Kind], roles: Sequence[str], fleet: Mapping[str, str]) -> Fault:
    """One fault. fleet: the role of every process that there is, by id. ExpertMeshError where none of them can have it.

    A partition is always one router's from one expert worker, whatever `roles` say.
    """
    kind = rng.choice(kinds)
    victims = sorted(name for name, role in fleet.items() if role in (["router"] if kind == "partition" else roles))
    if not victims:
        raise ExpertMeshError(f"this cluster has no {' or '.join(roles)} for a {kind}")
    victim = rng.choice(victims)
    if kind == "kill":
        return Fault(kind, victim)
    if kind == "pause":
        return Fault(kind, victim, rng.choice(PAUSES_S))
    seconds = round(rng.uniform(*LASTING_S), 1)
    if kind == "slow":
        return Fault(kind, victim, seconds)
    workers = sorted(name for name, role in fleet.items() if role == "expert")
    if not workers:
        raise ExpertMeshError("this cluster has no expert workers to be cut off from")
    return Fault(kind, victim, seconds, peer=rng.choice(workers))
