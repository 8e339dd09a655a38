"""The stream to one router, at moments that are rare with a whole session."""

from __future__ import annotations

import asyncio
import random
import socket

from cluster.gateway.router_stream import RouterStream
from tests.credentials import CREDENTIALS
from tests.loop import in_loop


@in_loop
async def test_a_stream_that_is_closed_while_its_call_fails_ends() -> None:
    """gRPC swallows the cancellation of one in a hundred: would catch a stream that goes on connecting for ever."""
    chance = random.Random(1)

    async def close(address: str) -> None:
        stream = RouterStream("router-0", address, CREDENTIALS, lambda *_: None, lambda *_: None)
        for _ in range(chance.randint(0, 20)):
            await asyncio.sleep(0)
        await asyncio.wait({stream.close()})

    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody_listens.getsockname()[1]}"
        for _ in range(200):
            await asyncio.gather(*(close(address) for _ in range(10)))
