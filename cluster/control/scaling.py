"""More or fewer processes while requests run: one transaction, with a receipt.

New processes are ready before anything depends on them, expert workers that leave hold nothing when they end, routers
that leave have finished what they had, or it goes on elsewhere after `drain_timeout_s`. When a new one cannot start, or
the experts find no room, everything is as before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import numpy as np

from cluster.control.goal import Processes, Scaling, check_resized
from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.options import ProcessBytes
from cluster.control.receipt import Receipt
from cluster.control.view import GATEWAYS
from cluster.errors import PlacementError
from cluster.placement.planner import Limits
from workers.host_memory import available_bytes

_log = logging.getLogger(__name__)

_POLL_S = 0.1
START_TIMEOUT_S = 300.0  # for new processes to be ready, where nobody says otherwise


class Scaler:
    """Carries out `scale`, beside the verbs of `operator`: one at a time."""

    def __init__(
        self,
        membership: Membership,
        operator: Operator,
        drain_timeout_s: float,
        expert_bytes: int,
        process_bytes: ProcessBytes | None = None,
    ) -> None:
        self._membership = membership
        self._process_bytes = process_bytes or ProcessBytes()
        self._operator = operator
        self._drain_timeout_s = drain_timeout_s
        self._expert_bytes = expert_bytes

    async def scale(
        self,
        workers: int | None = None,
        routers: int | None = None,
        gateways: int | None = None,
        timeout_s: float = START_TIMEOUT_S,
        reason: str = "",
    ) -> Receipt:
        """As many of each; None: as many as there are.

        PlacementError when that cannot be, or new ones are not ready within `timeout_s`: all is as before then.
        """
        async with self._operator.lock:
            before, placement = self._membership.goal.processes, self._membership.epochs.placement
            if workers is not None and workers > max(len(before.workers), placement.n_layers * placement.n_experts):
                raise PlacementError(f"{workers} expert workers are more than the model has experts")
            after = before.resized(workers, routers, gateways, self._operator.drained)
            check_resized(before, after, placement.n_experts > 0)
            self._check_room(before, after)
            return await self._carry_out(Scaling(before, after), timeout_s, reason)

    def _check_room(self, before: Processes, after: Processes) -> None:
        """PlacementError where all are of this machine and its memory does not suffice: the system would else end any
        process, of whoever it is."""
        each = self._process_bytes
        wanted = (
            max(0, len(after.workers) - len(before.workers)) * each.worker
            + max(0, len(after.routers) - len(before.routers)) * each.router
            + max(0, after.gateways - before.gateways) * each.gateway
        )
        if wanted and wanted > (available := available_bytes()):
            raise PlacementError(
                f"not enough memory: {after} need {wanted >> 20:,} MiB more, {available >> 20:,} MiB are available"
            )

    async def resume(self) -> None:
        """Go on with what a controller before this one had begun."""
        async with self._operator.lock:
            if (scaling := self._membership.goal.scaling) is not None:
                try:
                    await self._carry_out(scaling, START_TIMEOUT_S, "begun before the controller was restarted")
                except PlacementError as error:
                    _log.warning("what was begun before this controller was restarted has failed: %s", error)

    async def _carry_out(self, scaling: Scaling, timeout_s: float, reason: str) -> Receipt:
        """Let all of both run, place the experts, then let those go that are too many."""
        before, after = scaling.before, scaling.after
        action = f"scale to {after}" + (f" ({reason})" if reason else "")
        self._membership.aim(replace(self._membership.goal, processes=before | after, scaling=scaling))
        leaving = frozenset(before.workers) - frozenset(after.workers)
        try:
            await self._await_ready(before, after, timeout_s)
            receipt = await self._place(before, after, leaving, action)
        except Exception as error:  # also one that is no PlacementError: a scaling that nobody ends keeps others out
            # A fail-over that came between may have left experts on some of the new ones: those cannot go.
            new = set(after.workers) - set(before.workers)
            stay = Processes(tuple(sorted(new & self._membership.epochs.placement.holding)))
            left = f"{stay} that hold experts by now stay" if stay.workers else "all is as before"
            self._operator.events.add("scale", f"{action}: {error}; {left}", level="warning")
            self._membership.aim(replace(self._membership.goal, processes=before | stay, scaling=None))
            if stay.workers and isinstance(error, PlacementError):
                raise PlacementError(f"{error}; {left}") from error
            raise
        await self._drain(frozenset(before.routers) - frozenset(after.routers))
        goal = self._membership.goal
        drained = goal.drained - leaving
        self._membership.aim(replace(goal, processes=after, scaling=None, leaving=frozenset(), drained=drained))
        return receipt

    async def _place(self, before: Processes, after: Processes, leaving: frozenset[str], action: str) -> Receipt:
        """Experts on the new workers, none on those that leave."""
        if set(before.workers) == set(after.workers):
            return await self._operator.reach(self._membership.epochs.placement, action)
        # What the others hold stays where it is while workers leave: that is no rebalance.
        limits = Limits(expert_bytes=self._expert_bytes, tolerance=np.inf if leaving else 0.01)
        return await self._operator.follow(self._operator.plan(limits, leaving), action, leaving)

    async def _await_ready(self, before: Processes, after: Processes, timeout_s: float) -> None:
        """The new ones: how those are that were there is no reason against it."""
        deadline = time.monotonic() + timeout_s
        n_gateways = after.gateways if after.gateways > before.gateways else 0
        while missing := self._missing(after.ids - before.ids, n_gateways):
            failed = {who: why for who, why in self._membership.view.failures.items() if who in missing}
            if failed:
                who, why = next(iter(sorted(failed.items())))
                raise PlacementError(f"{who} did not start: {why}")
            if time.monotonic() > deadline:
                raise PlacementError(f"{', '.join(missing)} did not start within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    def _missing(self, processes: frozenset[str], n_gateways: int) -> list[str]:
        """The processes, or GATEWAYS, that are not all ready."""
        ready = [member for member in self._membership.view.members if member.state == "ready"]
        missing = sorted(processes - {member.id for member in ready})
        enough = sum(member.role == "gateway" for member in ready) >= n_gateways
        return missing if enough else [*missing, GATEWAYS]

    async def _drain(self, routers: frozenset[str]) -> None:
        """Let routers finish what they have; what is left after `drain_timeout_s` goes on elsewhere when they end."""
        if not routers:
            return
        self._membership.aim(replace(self._membership.goal, leaving=routers))
        deadline = time.monotonic() + self._drain_timeout_s
        while time.monotonic() < deadline:
            members = {member.id: member for member in self._membership.view.members if member.id in routers}
            if all(m.state == "lost" or (m.state == "draining" and not m.detail.get("open")) for m in members.values()):
                return
            await asyncio.sleep(_POLL_S)
        _log.warning("requests of %s outlived the drain; they go on elsewhere", ", ".join(sorted(routers)))
