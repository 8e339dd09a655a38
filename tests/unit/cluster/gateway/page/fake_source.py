"""A controller for the live page: what it says is what a test wants it to."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cluster.control.events import Events
from cluster.control.goal import Goal
from cluster.control.membership import Membership
from cluster.control.observation import observe
from cluster.control.operator import Operator
from cluster.control.rebalancer import RebalanceOptions, Rebalancer
from cluster.control.view import Member
from cluster.placement.load import Load
from cluster.placement.placement import Placement, striped


class FakeSource:
    """A real observation of a made-up cluster; `shape` is (layers, experts, workers)."""

    def __init__(self, shape: tuple[int, int, int] = (32, 8, 4), *, seed: int = 0, traffic: bool = True) -> None:
        self.n_layers, self.n_experts, n_workers = shape
        self.workers = tuple(f"expert-{i}" for i in range(n_workers))
        self.membership = Membership(striped(self.n_layers, self.n_experts, self.workers), Goal(), 0.0, 1)
        self.events = Events()
        self.operator = Operator(self.membership, self._never, 10, self.events)
        self.rebalancer = Rebalancer(self.operator, RebalanceOptions(), 10)
        self.draw = np.random.default_rng(seed)
        self.skew_LE = self.draw.zipf(1.6, (self.n_layers, self.n_experts)).clip(0, 60) * 40.0
        self.traffic = traffic
        self.away = False
        self.observed = 0
        self.operated: list[tuple[str, Any, str]] = []
        self.tokens = 0
        self.placed: Placement | None = None
        self.states = dict.fromkeys(self.workers, "ready")
        self.report()
        self.events.see(self.membership.view.members)

    async def _never(self, placement: Placement, reason: str) -> Any:
        raise AssertionError

    def report(self) -> None:
        """Everybody says how it is."""
        placement = self.membership.epochs.placement
        load_LE = self.skew_LE * self.draw.uniform(0.85, 1.15, self.skew_LE.shape) if self.traffic else self.skew_LE * 0
        if self.placed is not placement:
            self.placed = placement
            self.share_WLE = np.zeros((len(placement.workers), self.n_layers, self.n_experts))
            for worker, layer, expert in placement.all_replicas():
                home = placement.workers.index(worker)
                self.share_WLE[home, layer, expert] = 1 / len(placement.replicas[layer][expert])
        rows = dict(zip(placement.workers, (self.share_WLE * load_LE).sum((1, 2)).tolist(), strict=True))
        slots = 3 * self.n_layers * self.n_experts // (2 * len(self.workers))
        for i, (worker, state) in enumerate(self.states.items()):
            self._say(Member("expert", worker, 4000 + i, "n", state, "x:1", epoch=1, slots=slots))  # type: ignore[arg-type]
        load = Load(load_LE.astype(np.int64), load_LE, dict.fromkeys(rows, 1), rows)
        numbers: dict[str, object] = {"running": 6, "waiting": 1, "free_blocks": 700, "total_blocks": 1024}
        self._say(Member("router", "router-0", 3000, "n", "ready", "x:1", epoch=1, load=load, detail=numbers))
        self.tokens += int(self.draw.integers(60, 110)) if self.traffic else 0
        detail: dict[str, object] = {"open": 7, "requests": 1234, "tokens": self.tokens}
        if self.traffic:
            first, following = self.draw.uniform(0.08, 0.12), self.draw.uniform(0.015, 0.02)
            detail |= {"first_token_s": (first, 2 * first), "next_token_s": (following, 1.7 * following)}
        self._say(Member("gateway", "gateway-0", 2000, "n", "ready", "http://x", detail=detail))

    def _say(self, member: Member) -> None:
        self.membership.report(member, 0.0)

    def place(self, placement: Placement) -> None:
        """Another placement is in force."""
        self.membership.epochs.placement = placement

    async def observe(self, known_epoch: int, known_event: int) -> dict[str, Any]:
        self.observed += 1
        if self.away:
            raise ConnectionError("the controller is gone")
        self.report()
        return observe(self.membership, self.operator, self.rebalancer, known_epoch, known_event) | {"at": time.time()}

    async def operate(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        self.operated.append((path, body, key))
        if key != "admin":
            return 401, {"detail": "the admin API needs the cluster's admin token"}
        if body.get("dry_run"):
            forecast = {"imbalance_before": 1.62, "imbalance_after": 1.01, "moved_replicas": 9, "seconds": 0.8}
            return 200, {"forecast": forecast}
        if "drain" in path and "expert-9" in path:
            return 409, {"detail": "there is no expert worker expert-9"}
        return 200, {"action": path.strip("/"), "epoch_after": 2, "seconds": 0.5, "added": 3, "removed": 3}
