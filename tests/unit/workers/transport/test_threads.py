"""A thread that serves and ends must not leave a process behind that looks alive."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from workers.transport.threads import LoopThread

_RAISES = "serve_thread(lambda: 1 / 0, 'experts')"
_STOPS = """
import asyncio
async def stop(): asyncio.get_running_loop().stop()
LoopThread('experts').run(stop())
"""
_WATCHDOG = """
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
GrpcTransport._look = lambda *arguments: 1 / 0
GrpcTransport("router-0", "m", Credentials("t"))
"""
_ENGINE = """
from cluster.router.engine_thread import EngineThread
class Engine:
    has_work = staticmethod(lambda: True)
    step = staticmethod(lambda: 1 / 0)
EngineThread(Engine(), print).start()
"""


@pytest.mark.parametrize("end", [_RAISES, _STOPS, _WATCHDOG, _ENGINE])
def test_its_process_ends_with_it(end: str) -> None:
    code = f"import time\nfrom workers.transport.threads import *\n{end}\ntime.sleep(300)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "its process ends" in done.stderr


def test_a_loop_that_is_closed_leaves_the_process_alone() -> None:
    thread = LoopThread("experts")

    async def say() -> str:
        return await thread.off_loop(str, 7)

    assert thread.run(say()) == "7"
    thread.close()
    assert not thread.is_alive


def test_what_waits_in_a_loop_that_is_closed_ends_in_order() -> None:
    thread, ended = LoopThread("experts"), []

    async def wait() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("in order")

    async def begin() -> None:
        waiting.append(asyncio.create_task(wait()))
        await asyncio.sleep(0)

    waiting: list[asyncio.Task[None]] = []
    thread.run(begin())
    thread.close()
    assert waiting[0].cancelled() and ended == ["in order"]
