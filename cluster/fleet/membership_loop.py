"""A member's side of `Controller.sync`: call it for ever, hand over every new view."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from cluster.fleet.membership import View
from workers.member import Member

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0  # a call without news takes one second
_RETRY_S = 0.2


async def follow(controller: Any, describe: Callable[[], Member], on_view: Callable[[View], None]) -> None:
    """Tell `controller` (a Ray actor handle) what `describe` says, for ever; call `on_view` with each new view.

    A controller that is away costs nothing but news: the data plane goes on with the last view.
    """
    known, away = 0, False
    while True:
        try:
            view: View = await asyncio.wait_for(controller.sync.remote(describe(), known), _CALL_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            if not away:
                log.warning("the controller is away (%s); going on with the view of before", type(error).__name__)
            away = True
            await asyncio.sleep(_RETRY_S)
            continue
        if away:
            log.info("the controller is back")
            away = False
        if view.version != known:
            known = view.version
            on_view(view)
