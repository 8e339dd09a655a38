"""A router process without a model: `python -m tests.fake_router NAME STEP_S`. Prints its address."""

from __future__ import annotations

import asyncio
import sys

from cluster.router.service import GenerationService
from tests.credentials import CREDENTIALS
from tests.fake_engine import FakeEngine


async def main(router: str, step_s: float) -> None:
    service = GenerationService(FakeEngine(step_s=step_s), "127.0.0.1", router=router, credentials=CREDENTIALS)
    await service.start()
    print(service.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
