"""A member of the cluster: it starts or ends, and calls `Controller.sync` for ever to hand over every new view."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayError

from workers.member import Member

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0  # a call without news takes one second
_RETRY_S = 0.2
_LAST_WORD_S = 2.0


class Versioned(Protocol):
    """All that the loop itself reads of a view: a higher version is a newer one."""

    @property
    def version(self) -> int: ...


class Loading(Protocol):
    """A checkpoint that is being read."""

    @property
    def bytes_read(self) -> int: ...


View = TypeVar("View", bound=Versioned)


def node_address() -> str:
    """The address of this machine that Ray uses: 127.0.0.1 in a Ray of our own."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def start_or_end(start: Coroutine[Any, Any, str], name: str) -> asyncio.Task[str]:
    """Run `start`, which returns the address that the member `name` serves at, in a task.

    A member that cannot start ends after it could say why to whoever awaits the task; Ray tries again.
    """

    def end_if_failed(started: asyncio.Task[str]) -> None:
        if (error := started.exception()) is not None:
            _log.error("%s cannot start", name, exc_info=error)
            started.get_loop().call_later(_LAST_WORD_S, os._exit, 1)

    task = asyncio.get_event_loop().create_task(start)
    task.add_done_callback(end_if_failed)
    return task


def loading(source: Loading | None) -> dict[str, object]:
    """What a member that loads `source` says of itself for people; nothing without one."""
    return {} if source is None else {"loaded_bytes": source.bytes_read}


class MembershipLoop(Generic[View]):
    """Tells the controller what `describe` says, for ever; calls `on_view` with each new view.

    `controller` is a handle, or what stands for one. When it is away that costs nothing but news: the data plane goes
    on with the last view. Runs in the asyncio loop of whoever makes it; `close` ends it.
    """

    def __init__(self, controller: Any, describe: Callable[[], Member], on_view: Callable[[View], None]) -> None:
        self._controller = controller
        self._describe = describe
        self._on_view = on_view
        self._news = asyncio.Event()
        self._loop = asyncio.get_event_loop()
        self._task = self._loop.create_task(self._run())

    def tell(self) -> None:
        """What `describe` says has changed: let the controller know now. From any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        known, away = 0, False
        while True:
            try:
                view = await self._call(known)
                if away:
                    _log.warning("the controller is back")
                    away = False
                if view is not None and view.version != known:
                    known = view.version
                    self._on_view(view)
            except (RayError, TimeoutError) as error:
                if not away:
                    _log.warning("the controller is away (%s); going on with the last view", type(error).__name__)
                away = True
                await asyncio.sleep(_RETRY_S)
            except Exception:  # of ours; a member that fell silent would be lost for good
                _log.exception("a round of membership failed")
                await asyncio.sleep(_RETRY_S)

    async def _call(self, known: int) -> View | None:
        """One call; None when it was left alone because there is something to tell."""
        self._news.clear()
        call = asyncio.ensure_future(self._controller.sync.remote(self._describe(), known))
        news = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait({call, news}, timeout=_CALL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                view: View = call.result()
                return view
            if news.done():
                return None
            raise TimeoutError
        finally:
            news.cancel()
            call.cancel()
