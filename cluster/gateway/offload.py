"""Work that takes milliseconds, beside the event loop or in parts, so that other streams move meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_LONG = 8_000  # characters; to tokenise more takes milliseconds
TURN_S = 0.005  # for which one request may keep the event loop
_In = TypeVar("_In")
_Out = TypeVar("_Out")


async def give_way() -> None:
    """Between two parts of the work on a request, each of which may take milliseconds: let others have a turn."""
    await asyncio.sleep(0)


async def aside(function: Callable[[_In], _Out], value: _In, size: int) -> _Out:
    """`function(value)`; beside the event loop where that is as much work as a text of `size` characters, if long."""
    return function(value) if size < _LONG else await asyncio.to_thread(function, value)
