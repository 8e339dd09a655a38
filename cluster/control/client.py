"""A member's end of the control plane: it tells the controller of itself, for ever, and hands over every new view."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.control.view import Member, View

_log = logging.getLogger(__name__)

NAMESPACE = "expertmesh"
NAME = "controller"

_CALL_TIMEOUT_S = 10.0  # a call without news takes one second
_RETRY_S = 0.2


class ControllerClient:
    """Tells the controller what `describe` says, for ever; calls `on_view` with each new view.

    `controller` is a handle, or what stands for one. When it is away that costs nothing but news: the data plane goes
    on with the last view. Runs in the asyncio loop of whoever makes it; `close` ends it.
    """

    def __init__(self, controller: Any, describe: Callable[[], Member], on_view: Callable[[View], None]) -> None:
        self._controller = controller
        self._describe = describe
        self._on_view = on_view
        self._view: View | None = None
        self._handover: View | None = None  # what the controller asked for
        self._news = asyncio.Event()
        self._loop = asyncio.get_event_loop()
        self._task = self._loop.create_task(self._run())

    def tell(self) -> None:
        """What `describe` says has changed: let the controller know now. From any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        away = False
        while True:
            try:
                heard = await self._call()
                if away:
                    _log.warning("the controller is back")
                    away = False
                if heard is not None and (self._view is None or heard.version != self._view.version):
                    self._view = heard
                    self._on_view(heard)
            except (RayError, TimeoutError) as error:
                if not away:
                    _log.warning("the controller is away (%s); going on with the last view", type(error).__name__)
                away = True
                await asyncio.sleep(_RETRY_S)
            except Exception:  # of ours; a member that fell silent would be lost for good
                _log.exception("a round of membership failed")
                await asyncio.sleep(_RETRY_S)

    async def _call(self) -> View | None:
        """One call; None when it was left alone because there is something to tell, or asks for the last view."""
        self._news.clear()
        version, member = 0, self._describe()
        if self._view is not None:
            version = self._view.version
            member = replace(member, told=self._view.placement.epoch, aims=self._view.goal.revision)
        call = asyncio.ensure_future(self._controller.sync.remote(member, version, self._handover))
        self._handover = None
        news = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait({call, news}, timeout=_CALL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                heard: View | None = call.result()
                if heard is None:  # the controller was restarted and knows an older one
                    self._handover = self._view
                return heard
            if news.done():
                return None
            raise TimeoutError
        finally:
            news.cancel()
            call.cancel()


class ControllerByName:
    """Stands for the controller's handle in the constructor arguments of other actors.

    A handle there counts as a reference that could be lost, and Ray complains about it at the terminal.
    """

    @property
    def sync(self) -> Any:
        """`Controller.sync` of the actor."""
        return _handle().sync

    @property
    def observe(self) -> Any:
        """`Controller.observe` of the actor."""
        return _handle().observe


@cache
def _handle() -> Any:
    try:
        return ray.get_actor(NAME, NAMESPACE)
    except ValueError as error:
        raise RayError(f"there is no controller: {error}") from error
