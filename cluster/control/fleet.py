"""Brings about the processes that the goal names: starts what is missing, ends what is too many."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Protocol

from cluster.control.membership import LOST_AFTER_S, Membership
from cluster.control.view import GATEWAYS

_log = logging.getLogger(__name__)

_POLL_S = 0.1


class Launcher(Protocol):
    """What starts and ends processes. Its methods may block, and are called one at a time for the same process."""

    @property
    def n_gateways(self) -> int:
        """Gateways that there are at first, whoever started them."""

    def present(self) -> frozenset[str]:
        """The expert workers and routers that there are, also those that a controller before this one started."""

    def start(self, process: str) -> Awaitable[object]:
        """There is to be this expert worker or router from now on; whoever starts it again when it dies, does so until
        `end`. The result is there once it is ready, or raises what keeps it from that."""

    def end(self, process: str) -> None:
        """There is to be no such process; returns when another one of the same name can be started."""

    def scale_gateways(self, n: int) -> None:
        """There are to be `n` gateways; returns when they take requests. Raises what keeps them from that."""

    def why(self, error: Exception) -> str:
        """The cause of an error that one of these raised, in one line."""


class Fleet:
    """Follows the goal of `membership` with what `launcher` can do. What cannot be started is told to `membership`."""

    def __init__(self, membership: Membership, launcher: Launcher) -> None:
        self._membership = membership
        self._launcher = launcher
        self._started: dict[str, asyncio.Task[None]] = {}  # by process; its wait until that is ready
        self._present: frozenset[str] = frozenset()  # started by an earlier controller

    async def begin(self) -> None:
        """Find what is there. After a restart of the controller that takes until all of it has spoken, or is lost: only
        then it is known what the newest goal is."""
        self._present = await asyncio.to_thread(self._launcher.present)
        deadline = time.monotonic() + LOST_AFTER_S
        while not self._membership.rebuilt(self._present) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(self._follow_processes(), self._follow_gateways())

    async def _follow_processes(self) -> None:
        revision = -1
        while True:
            if self._membership.goal.revision != revision:
                revision = self._membership.goal.revision
                wanted = self._membership.goal.processes.ids
                unwanted = (self._present | self._started.keys()) - wanted
                await asyncio.gather(
                    *(self._end(process) for process in sorted(unwanted)),
                    *(self._start(process) for process in sorted(wanted - self._started.keys())),
                )
            await asyncio.sleep(_POLL_S)

    async def _start(self, process: str) -> None:
        try:
            ready = await asyncio.to_thread(self._launcher.start, process)
        except Exception as error:
            _log.exception("%s cannot be started", process)
            self._membership.failed(process, self._launcher.why(error))
            return
        self._started[process] = asyncio.create_task(self._await_ready(process, ready))

    async def _await_ready(self, process: str, ready: Awaitable[object]) -> None:
        try:
            await ready
        except Exception as error:
            self._membership.failed(process, self._launcher.why(error))

    async def _end(self, process: str) -> None:
        if (waiting := self._started.pop(process, None)) is not None:
            waiting.cancel()
        try:
            await asyncio.to_thread(self._launcher.end, process)
        except Exception:
            _log.exception("%s cannot be ended", process)
        else:
            self._present -= {process}
            self._membership.ended(process)

    async def _follow_gateways(self) -> None:
        n = self._launcher.n_gateways
        while True:
            goal = self._membership.goal
            if goal.processes.gateways != n:
                n = goal.processes.gateways
                try:
                    await asyncio.to_thread(self._launcher.scale_gateways, n)
                except Exception as error:
                    _log.exception("%d gateways cannot be had", n)
                    self._membership.failed(GATEWAYS, self._launcher.why(error))
                else:
                    self._membership.served()
            await asyncio.sleep(_POLL_S)
