"""A router process without a model: `python -m tests.fake_router`. Prints the port it serves."""

from __future__ import annotations

import asyncio
import sys

from cluster.router.service import GenerationService
from tests.fake_engine import FakeEngine


async def main(step_s: float) -> None:
    service = GenerationService(FakeEngine(step_s=step_s), "127.0.0.1")
    await service.start()
    print(service.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
