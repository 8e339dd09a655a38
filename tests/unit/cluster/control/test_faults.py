"""Catches a process that stays stopped, one that is hit before whoever asked is answered, and a fault without a word of
allowance."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from ray.exceptions import ActorUnavailableError

from cluster.control.chaos import Chaos
from cluster.control.events import Events
from cluster.control.faults import Fault, inflict
from cluster.control.goal import Goal
from cluster.control.membership import Membership
from cluster.control.view import Member
from cluster.errors import PlacementError
from cluster.placement.placement import striped
from tests.waiting import wait_until


def test_a_process_is_stopped_goes_on_and_dies() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        process = psutil.Process(child.pid)

        def is_stopped() -> bool:
            return process.status() == psutil.STATUS_STOPPED

        began = time.monotonic()
        inflict(Fault("pause", "x", 1.0), child.pid)
        at_once = is_stopped()
        assert not at_once or time.monotonic() - began > 0.05, "whoever asked could not be answered"
        wait_until(is_stopped)
        wait_until(lambda: not is_stopped())
        inflict(Fault("slow", "x", 1.0, stopped=0.9), child.pid)
        wait_until(is_stopped)
        began, used, stops = time.monotonic(), process.cpu_times().user, 0
        while time.monotonic() < began + 0.8:
            stops += is_stopped()
            time.sleep(0.01)
        assert stops >= 5
        assert process.cpu_times().user - used < 0.6
        time.sleep(0.5)
        wait_until(lambda: not is_stopped())
        inflict(Fault("kill", "x"), child.pid)
        assert child.wait(30) == -9


def test_faults_have_to_be_allowed_and_name_who_is_there() -> None:
    membership = Membership(striped(1, 2, ("expert-0",)), Goal(), 0.0, 1)
    membership.report(Member("expert", "expert-0", 1, "n", "ready", "x:1"), 0.0)
    membership.report(Member("router", "router-0", 2, "n", "ready", "x:1"), 0.0)
    events = Events()
    with pytest.raises(PlacementError, match="was not started with --allow-chaos"):
        asyncio.run(Chaos(membership, events, allowed=False).inflict(Fault("kill", "expert-0")))
    chaos = Chaos(membership, events, allowed=True)
    for fault, reason in (
        (Fault("kill", "expert-7"), "no router or expert expert-7; there are expert-0, router-0"),
        (Fault("partition", "router-0", 1, peer="router-0"), "no expert router-0; there are expert-0"),
        (Fault("partition", "expert-0", 1, peer="expert-0"), "between a router and an expert worker, not of expert-0"),
        (Fault("partition", "controller", 1, peer="expert-0"), "not of controller"),
    ):
        with pytest.raises(PlacementError, match=reason):
            asyncio.run(chaos.inflict(fault))
    assert not events.after(0)


def test_a_process_that_is_gone_before_it_could_answer_got_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a kill comes before the answer that it will: a campaign went no further then."""

    async def remote(fault: Fault) -> None:
        raise ActorUnavailableError("the socket is closed", None)

    going = SimpleNamespace(inflict=SimpleNamespace(remote=remote))
    membership = Membership(striped(1, 2, ("expert-0",)), Goal(), 0.0, 1)
    membership.report(Member("expert", "expert-0", 1, "n", "ready", "x:1"), 0.0)
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: going)
    chaos = Chaos(membership, Events(), allowed=True)
    asyncio.run(chaos.inflict(Fault("kill", "expert-0")))
    with pytest.raises(PlacementError, match="expert-0 is going down or coming up: try again"):
        asyncio.run(chaos.inflict(Fault("slow", "expert-0", 1.0)))
