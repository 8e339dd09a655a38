"""Catches a member that falls silent for good, and news that wait for the next round."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.control import client as module
from cluster.control.client import ControllerClient
from cluster.control.goal import Goal
from cluster.control.view import Member, View
from cluster.placement.placement import striped
from tests.loop import in_loop, until

ROUTER = Member("router", "router-0", 10, "n", "ready", "127.0.0.1:1")


class Controller:
    """Answers every call with a newer view."""

    def __init__(self) -> None:
        self.calls = 0
        self.sync = SimpleNamespace(remote=self._sync)

    async def _sync(self, member: Member, known: int, heard: View | None = None) -> View | None:
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
        patch.setattr(module, "_RETRY_S", 0.001)
        loop = ControllerClient(controller, describe, on_view)
        await until(lambda: len(views) >= 3)
        loop.close()
    assert not mistakes


@in_loop
async def test_a_thread_of_another_kind_can_tell() -> None:
    """A group breaks in a thread of its own; the controller has to hear of it before the next round."""
    controller = Controller()
    broken = 0

    async def never(member: Member, known: int, heard: View | None = None) -> View:
        controller.calls = member.broken
        await asyncio.sleep(60)
        raise AssertionError

    controller.sync.remote = never
    loop = ControllerClient(controller, lambda: replace(ROUTER, broken=broken), lambda view: None)
    await asyncio.sleep(0.01)
    broken = 7
    await asyncio.to_thread(loop.tell)
    await until(lambda: controller.calls == 7)
    loop.close()


@in_loop
async def test_a_restarted_controller_is_given_the_view_it_asks_for() -> None:
    given: list[tuple[int, int, View | None]] = []
    newest = View(7, (), striped(1, 1, ("expert-0",), epoch=4), goal=Goal(revision=3))

    async def sync(member: Member, known: int, heard: View | None = None) -> View | None:
        await asyncio.sleep(0.001)
        given.append((member.told, member.aims, heard))
        return None if len(given) == 2 else newest

    loop = ControllerClient(SimpleNamespace(sync=SimpleNamespace(remote=sync)), lambda: ROUTER, lambda view: None)
    await until(lambda: len(given) >= 4)
    loop.close()
    assert given[:4] == [(0, 0, None), (4, 3, None), (4, 3, newest), (4, 3, None)]
