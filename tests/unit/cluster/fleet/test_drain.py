"""Catches a drain that cuts off an open request, lets new ones in, or fails the liveness probe."""

import asyncio
from typing import Any

from cluster.fleet.drain import Drain


def request(path: str) -> dict[str, Any]:
    return {"type": "http", "path": path}


async def status_of(app: Drain, path: str) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    await app(request(path), receive, send)
    return int(sent[0]["status"])


def test_open_requests_finish_and_new_ones_are_refused() -> None:
    async def main() -> None:
        finish = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/slow":
                await finish.wait()
            await send({"type": "http.response.start", "status": 200})

        idle: list[int] = []
        drain = Drain(app, on_idle=lambda: idle.append(drain.open))
        slow = asyncio.create_task(status_of(drain, "/v1/slow"))
        await asyncio.sleep(0)
        assert drain.open == 1
        await status_of(drain, "/live")  # a page that looks on is no request to finish
        assert drain.open == 1
        drain.draining = True
        assert await status_of(drain, "/v1/other") == 503
        assert await status_of(drain, "/ready") == 503
        assert await status_of(drain, "/health") == 200
        assert not idle
        finish.set()
        assert await slow == 200
        assert drain.open == 0
        assert idle == [0]

    asyncio.run(main())
