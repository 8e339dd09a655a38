"""Scales routers and expert workers by their load, each pool for itself, or says what it would do."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.control.autoscale import AutoscaleOptions, Decision, Sample, decide
from cluster.control.goal import Bounds
from cluster.control.membership import Membership
from cluster.control.scaling import Scaler
from cluster.control.view import Member
from cluster.errors import PlacementError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pool:
    """What is known of one of the two."""

    samples: deque[Sample]
    tried: float = -math.inf  # when it was changed last, or that failed
    decision: Decision | None = None


@dataclass(slots=True)
class AutoscalerHealth:
    """How the autoscaler itself is doing, and how many processes it wants."""

    mode: str
    looked: float | None = None  # seconds since 1970
    targets: dict[str, int] = field(default_factory=dict)  # by pool: `router`, `expert`
    reasons: dict[str, str] = field(default_factory=dict)
    signals: dict[str, dict[str, float]] = field(default_factory=dict)  # by pool, multiples of their targets
    failures: int = 0  # in a row
    actions: int = 0


class Autoscaler:
    """Looks at the members now and then."""

    def __init__(self, membership: Membership, scaler: Scaler, options: AutoscaleOptions, max_sequences: int) -> None:
        """max_sequences: places in the batch of a router."""
        self.health = AutoscalerHealth(options.mode)
        self._membership = membership
        self._scaler = scaler
        self._options = options
        self._max_sequences = max_sequences
        kept = 2 + int(max(options.idle_s, options.window_s) / options.interval_s)
        self._pools = {role: Pool(deque(maxlen=kept)) for role in ("router", "expert")}
        self._counted: dict[str, tuple[int, float, float, float]] = {}  # by worker: pid, when, seconds computed, waited

    async def run(self) -> None:
        """For ever, unless it is off."""
        while self._options.mode != "off":
            await asyncio.sleep(self._options.interval_s)
            try:
                await self.look(time.monotonic())
            except PlacementError as error:
                self.health.failures += 1
                _log.warning("autoscale: %s", error)
            except Exception:
                self.health.failures += 1
                _log.exception("the autoscaler failed")

    async def look(self, now: float) -> None:
        """One sample of each pool, a decision and, in mode auto, what it says. PlacementError when that failed."""
        goal = self._membership.goal
        if goal.scaling is not None:  # an operator's
            return
        members = [member for member in self._membership.view.members if member.state == "ready"]
        routers = [member for member in members if member.id in goal.processes.routers]
        workers = [m for m in members if m.id in goal.processes.workers and m.id not in goal.drained]
        signals = router_signals(routers, self._max_sequences, self._options)
        self._see("router", now, len(goal.processes.routers), signals)
        if goal.processes.workers:
            self._see("expert", now, len(goal.processes.workers), self._worker_signals(workers, now))
        self.health.looked = time.time()
        changed = {
            role: pool.decision.n
            for role, pool in self._pools.items()
            if pool.decision is not None and pool.samples and pool.decision.n != pool.samples[-1].n
        }
        if changed and self._options.mode == "auto":
            for role in changed:
                self._pools[role].tried = now
            reasons = "; ".join(f"{role}: {self.health.reasons[role]}" for role in sorted(changed))
            await self._scaler.scale(changed.get("expert"), changed.get("router"), reason=f"autoscale, {reasons}")
            self.health.actions += 1
            self.health.failures = 0

    def _see(self, role: str, now: float, n: int, signals: Mapping[str, float] | None) -> None:
        if signals is None:
            return
        pool = self._pools[role]
        pool.samples.append(Sample(now, n, signals))
        bounds = self._membership.goal.bounds or Bounds(self._options.routers, self._options.workers)
        limits = bounds.routers if role == "router" else bounds.workers
        decision = decide(list(pool.samples), limits, self._options, pool.tried)
        if pool.decision is None or decision.n != pool.decision.n:
            _log.info("autoscale: %d -> %d %ss: %s", n, decision.n, role, decision.reason)
        pool.decision = decision
        self.health.targets[role], self.health.reasons[role] = decision.n, decision.reason
        self.health.signals[role] = dict(signals)

    def _worker_signals(self, workers: Sequence[Member], now: float) -> Mapping[str, float] | None:
        """From what the workers counted since the last look; None before the second one."""
        use, waiting = [], []
        for member in workers:
            computed, waited = _number(member, "compute_seconds"), _number(member, "waited_seconds")
            before = self._counted.get(member.id)
            self._counted[member.id] = (member.pid, now, computed, waited)
            if before is not None and before[0] == member.pid and now > before[1]:
                use.append((computed - before[2]) / (now - before[1]))
                waiting.append((waited - before[3]) / (now - before[1]))
        return worker_signals(use, waiting, self._options) if use else None


def router_signals(
    routers: Sequence[Member], max_sequences: int, options: AutoscaleOptions
) -> Mapping[str, float] | None:
    """What routers say of their load, as multiples of the targets: the mean of all. None without any."""
    if not routers:
        return None
    n = len(routers)
    queue = sum(_number(member, "waiting") for member in routers) / n
    places = sum(_number(member, "running") for member in routers) / (n * max_sequences)
    used = sum(_used(member) for member in routers) / n
    return {
        "queue": queue / options.queue,
        "KV cache": used / options.kv_use,
        "places in the batch": places / options.kv_use,
    }


def worker_signals(use: Sequence[float], waiting: Sequence[float], options: AutoscaleOptions) -> Mapping[str, float]:
    """use: part of the time in which each worker computed; waiting: requests that waited at it, on average.

    The mean of all: that they are not even is the rebalancer's business.
    """
    return {
        "utilisation": sum(use) / len(use) / options.worker_use,
        "waiting": sum(waiting) / len(waiting) / options.worker_waiting,
    }


def _used(router: Member) -> float:
    """Part of its KV blocks."""
    total = _number(router, "total_blocks")
    return 1 - _number(router, "free_blocks") / total if total else 0.0


def _number(member: Member, name: str) -> float:
    value = member.detail.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0
