"""Catches a member that falls silent for good, and a router that never gets ready again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet.membership import View
from cluster.fleet.router_actor import Router
from cluster.placement.placement import striped
from tests.loop import in_loop, until
from workers import membership
from workers.member import Member, State
from workers.membership import MembershipLoop

ROUTER = Member("router", "router-0", 10, "n", "ready", "127.0.0.1:1")


class Controller:
    """Answers every call with a newer view."""

    def __init__(self) -> None:
        self.calls = 0
        self.sync = SimpleNamespace(remote=self._sync)

    async def _sync(self, member: Member, known: int) -> View:
        self.calls += 1
        await asyncio.sleep(0.001)
        return View(known + 1, (member,), striped(1, 1, ("expert-0",)))


@in_loop
async def test_a_mistake_in_one_round_does_not_end_the_rounds() -> None:
    controller = Controller()
    mistakes = ["describe", "view"]
    views: list[View] = []

    def describe() -> Member:
        if "describe" in mistakes:
            raise KeyError(mistakes.pop(0))
        return ROUTER

    def on_view(view: View) -> None:
        if mistakes:
            raise ValueError(mistakes.pop())
        views.append(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "_RETRY_S", 0.001)
        loop = MembershipLoop(controller, describe, on_view)
        await until(lambda: len(views) >= 3)
        loop.close()
    assert not mistakes


@pytest.mark.parametrize(
    ("state", "becomes"), [("starting", "starting"), ("ready", "ready"), ("draining", "ready"), ("lost", "starting")]
)
def test_a_router_is_ready_once_its_workers_answer(state: State, becomes: str) -> None:
    expert = Member("expert", "expert-0", 12, "n", state, "127.0.0.1:3")
    service = SimpleNamespace(state="starting")

    async def set_state(state: str) -> None:
        service.state = state

    service.set_state = set_state
    router: Any = object.__new__(Router)
    router._service, router._exchange, router._collective = service, object(), None
    router._view = View(1, (expert,), striped(1, 1, ("expert-0",)))
    router._membership = SimpleNamespace(tell=lambda: None)
    asyncio.run(router._follow_state())
    assert service.state == becomes
