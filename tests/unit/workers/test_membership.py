"""Catches a member that falls silent for good or stays although it cannot start, and a router that never gets ready
again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet.membership import View
from cluster.fleet.router_actor import Router
from cluster.placement.placement import striped
from tests.loop import in_loop, until
from workers import membership
from workers.errors import CheckpointError
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


@in_loop
async def test_a_member_that_cannot_start_ends_after_it_said_why() -> None:
    """Would catch one that stays without serving, which Ray does not restart, and one that ends without a word."""
    ends: list[int] = []

    async def start() -> str:
        raise CheckpointError("no such file")

    async def start_well() -> str:
        return "127.0.0.1:1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "_LAST_WORD_S", 0.02)
        patch.setattr(membership.os, "_exit", ends.append)
        assert await membership.start_or_end(start_well(), "expert-0") == "127.0.0.1:1"
        with pytest.raises(CheckpointError, match="no such file"):
            await asyncio.shield(membership.start_or_end(start(), "expert-1"))
        assert ends == []
        await until(lambda: bool(ends))
        await asyncio.sleep(0.04)
    assert ends == [1]


@pytest.mark.parametrize(
    ("state", "becomes"), [("starting", "starting"), ("ready", "ready"), ("draining", "ready"), ("lost", "starting")]
)
def test_a_router_is_ready_once_its_workers_answer(state: State, becomes: str) -> None:
    router = starting_router(state)
    asyncio.run(router._follow_state())
    assert router._service.state == becomes


def test_a_router_is_not_ready_before_its_group_is() -> None:
    router = starting_router("ready")
    router._collective = SimpleNamespace(ready=0)
    asyncio.run(router._follow_state())
    assert router._service.state == "starting"
    router._collective.ready = 7
    asyncio.run(router._follow_state())
    assert router._service.state == "ready"


def starting_router(expert: State) -> Any:
    """A router that has loaded; its one expert worker is in state `expert`."""
    service = SimpleNamespace(state="starting")

    async def set_state(state: str) -> None:
        service.state = state

    service.set_state = set_state
    router: Any = object.__new__(Router)
    router._service, router._exchange, router._collective = service, object(), None
    member = Member("expert", "expert-0", 12, "n", expert, "127.0.0.1:3")
    router._view = View(1, (member,), striped(1, 1, ("expert-0",)))
    router._membership = SimpleNamespace(tell=lambda: None)
    return router


@in_loop
async def test_a_thread_of_another_kind_can_tell() -> None:
    """A group breaks in a thread of its own; the controller has to hear of it before the next round."""
    controller = Controller()
    broken = 0

    async def never(member: Member, known: int) -> View:
        controller.calls = member.broken
        await asyncio.sleep(60)
        raise AssertionError

    controller.sync.remote = never
    loop: MembershipLoop[View] = MembershipLoop(controller, lambda: replace(ROUTER, broken=broken), lambda view: None)
    await asyncio.sleep(0.01)
    broken = 7
    await asyncio.to_thread(loop.tell)
    await until(lambda: controller.calls == 7)
    loop.close()
