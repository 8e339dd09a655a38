"""Threads that serve: one that ends before it was told to takes its process with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from workers.ending import end_process

Result = TypeVar("Result")
P = ParamSpec("P")

_log = logging.getLogger(__name__)


def serve_thread(target: Callable[[], object], name: str) -> threading.Thread:
    """Start `target` in a daemon thread. What it raises is logged and ends the process: Ray starts another one."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            end_process(_log, f"thread {name} failed; its process ends", error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class LoopThread:
    """An asyncio loop in a thread of its own, and one more thread for what would hold it up."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._other = ThreadPoolExecutor(1, f"{name}-work")
        self._closing = False
        self._thread = serve_thread(self._run, name)

    @property
    def is_alive(self) -> bool:
        """Whether what was begun in the loop goes on."""
        return self._thread.is_alive() and not self._closing

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` in the loop and wait for what it returns. From any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def off_loop(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """What `function` returns, called in the other thread after what it was given before."""
        return await self._loop.run_in_executor(self._other, partial(function, *args, **kwargs))

    def close(self) -> None:
        """End the loop."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._other.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        if not self._closing:
            raise RuntimeError("the loop stopped by itself")
        self._loop.run_until_complete(_end_tasks(self._loop))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still waits for something; one that will not end is left behind."""
    left = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=1)
