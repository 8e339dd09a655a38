"""Catches a process that hangs and is left hanging, a stranger who is killed in its place, and a verb too early."""

import asyncio
import os
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control import controller as module
from cluster.control import membership
from cluster.control.controller import Controller
from cluster.control.goal import Goal, Processes
from cluster.control.options import AdminOptions, MetricsOptions, Options
from cluster.control.view import Member, View
from cluster.errors import PlacementError
from cluster.placement.placement import striped
from tests.loop import in_loop, until


def stand_in_for_ray(patch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    patch.setattr(module, "ray", SimpleNamespace(get_runtime_context=lambda: context))


def controller_of(*present: str) -> Controller:
    """One that has just been started, or started again, where these processes are."""
    options = Options(AdminOptions("127.0.0.1", 0, "t"), MetricsOptions("127.0.0.1", 0, False))
    launcher: Any = SimpleNamespace(present=lambda: frozenset(present), n_gateways=0)
    return Controller(striped(1, 1, ["expert-0"]), Processes(), launcher, options)


@in_loop
async def test_a_process_that_is_stopped_is_ended_and_that_of_another_node_is_not() -> None:
    mine, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))  # noqa: ASYNC220
    mine.send_signal(signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as patch:
            stand_in_for_ray(patch)
            patch.setattr(module, "_SWEEP_S", 0.01)
            patch.setattr(membership, "HUNG_AFTER_S", 0.2)
            controller = controller_of("expert-0")
            await controller.sync(Member("expert", "expert-1", other.pid, "elsewhere", "ready", ""), 0)
            await controller.sync(Member("expert", "expert-0", mine.pid, "here", "ready", ""), 0)
            await until(lambda: mine.poll() is not None)
        assert mine.returncode == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


@in_loop
async def test_a_verb_waits_until_a_restarted_controller_knows_what_is_in_force() -> None:
    """Would catch a move that is planned on the placement of the first start, and puts an older epoch in force."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_ray(patch)
        controller = controller_of("expert-0", "expert-1")
        newest = striped(1, 1, ["expert-1"], epoch=7)
        view = View(10**20, (), newest, goal=Goal(3))
        await asyncio.sleep(0)
        verb = asyncio.create_task(controller._operator.drop(0, 0, "expert-0"))
        for worker in ("expert-0", "expert-1"):
            assert not verb.done()
            member = Member("expert", worker, os.getpid(), "here", "ready", "x:1", told=7, aims=3)
            await controller.sync(member, 0, view)
        with pytest.raises(PlacementError, match="those are on expert-1"):
            await verb
