"""Catches an actor that cannot start and stays, or ends before it could say why."""

from __future__ import annotations

import asyncio

import pytest

from cluster.fleet import actor
from tests.loop import in_loop, until
from workers.errors import CheckpointError


@in_loop
async def test_a_member_that_cannot_start_ends_after_it_said_why() -> None:
    """Would catch one that stays without serving, which Ray does not restart, and one that ends without a word."""
    ends: list[int] = []

    async def start() -> str:
        raise CheckpointError("no such file")

    async def start_well() -> str:
        return "127.0.0.1:1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "_LAST_WORD_S", 0.02)
        patch.setattr(actor.os, "_exit", ends.append)
        assert await actor.start_or_end(start_well(), "expert-0") == "127.0.0.1:1"
        with pytest.raises(CheckpointError, match="no such file"):
            await asyncio.shield(actor.start_or_end(start(), "expert-1"))
        assert ends == []
        await until(lambda: bool(ends))
        await asyncio.sleep(0.04)
    assert ends == [1]
