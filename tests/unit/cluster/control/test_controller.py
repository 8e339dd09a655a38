"""Catches a process that hangs and is left hanging, or a stranger who is killed in its place."""

import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control import controller as module
from cluster.control import membership
from cluster.control.controller import Controller
from cluster.control.goal import Processes
from cluster.control.options import AdminOptions, MetricsOptions, Options
from cluster.control.view import Member
from cluster.placement.placement import striped
from tests.loop import in_loop, until


@in_loop
async def test_a_process_that_is_stopped_is_ended_and_that_of_another_node_is_not() -> None:
    mine, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))  # noqa: ASYNC220
    mine.send_signal(signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as patch:
            context = SimpleNamespace(get_node_id=lambda: "here")
            patch.setattr(module, "ray", SimpleNamespace(get_runtime_context=lambda: context))
            patch.setattr(module, "_SWEEP_S", 0.01)
            patch.setattr(membership, "HUNG_AFTER_S", 0.2)
            options = Options(AdminOptions("127.0.0.1", 0, "t"), MetricsOptions("127.0.0.1", 0, False))
            launcher: Any = SimpleNamespace(present=lambda: frozenset(["expert-0"]), n_gateways=0)
            controller = Controller(striped(1, 1, ["expert-0"]), Processes(), launcher, options)
            await controller.sync(Member("expert", "expert-1", other.pid, "elsewhere", "ready", ""), 0)
            await controller.sync(Member("expert", "expert-0", mine.pid, "here", "ready", ""), 0)
            await until(lambda: mine.poll() is not None)
        assert mine.returncode == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
