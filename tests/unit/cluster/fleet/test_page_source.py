"""Catches a page that reaches past the admin API's rules, or hides what the API answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.control import api
from cluster.control.options import AdminOptions
from cluster.control.scaling import Scaler
from cluster.errors import RequestError
from cluster.fleet.page_source import ControllerSource
from tests.unit.cluster.gateway.page.fake_source import FakeSource


class Handle:
    """Stands for the controller's actor handle."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen
        self.observe = self

    async def remote(self, known_epoch: int, known_event: int) -> dict[str, Any]:
        return dict(self.seen) | {"known": (known_epoch, known_event)}


def test_verbs_go_to_the_admin_api_which_decides() -> None:
    fake = FakeSource((3, 4, 2))
    scaler = Scaler(fake.membership, fake.operator, 1.0, 10)
    app = api.create_app(fake.membership, fake.operator, scaler, fake.rebalancer, "token")

    async def main() -> list[tuple[int, Any]]:
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(api.serve(app, AdminOptions("127.0.0.1", 0, "token"), listening.set_result))
        source = ControllerSource(Handle({"admin_address": await listening, "epoch": 1}))
        with pytest.raises(RequestError, match="not known yet"):
            await source.operate("/rebalance", {}, "token")
        assert await source.observe(3, 4) == {"epoch": 1, "known": (3, 4)}, "browsers are told no address"
        asked = [
            await source.operate("/rebalance", {"dry_run": True}, "wrong"),
            await source.operate("/rebalance", {"dry_run": True}, "token"),
            await source.operate("/workers/expert-9/drain", {}, "token"),
        ]
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        gone = ControllerSource(Handle({"admin_address": "127.0.0.1:9"}))
        await gone.observe(0, 0)
        with pytest.raises(RequestError, match="did not answer"):
            await gone.operate("/rebalance", {}, "token")
        return asked

    refused, planned, unknown = asyncio.run(main())
    assert refused == (401, {"detail": "the admin API needs the cluster's admin token"})
    assert planned[0] == 200 and planned[1]["forecast"]["imbalance_before"] >= 1
    assert unknown[0] == 409 and "no expert worker expert-9" in unknown[1]["detail"]
