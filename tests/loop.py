"""Run an async test in a loop of its own, with a limit so that a hang is a failure."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")
LIMIT_S = 240  # far above what any test takes, also with other work on the machine


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), LIMIT_S))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something that happens elsewhere has happened."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)
