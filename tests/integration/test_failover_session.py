"""Two router processes killed again and again, at times both at once: would catch a token lost, doubled or changed."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from itertools import count
from pathlib import Path

from cluster.gateway.session import Session
from cluster.gateway.suspects import MAX_LOSSES
from cluster.router.params import SamplingParams
from tests.credentials import CREDENTIALS
from tests.fake_engine import expected
from tests.loop import in_loop

ROOT = Path(__file__).resolve().parent.parent.parent
STREAMS, KILLS, STEP_S = 16, 20, 0.005


class Routers:
    """Two router processes and the session's view of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.processes: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}

    async def spawn(self, name: str) -> None:
        command = [sys.executable, "-m", "tests.fake_router", name, str(STEP_S)]
        process = self.processes[name] = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=ROOT)
        assert process.stdout is not None
        self.addresses[name] = (await process.stdout.readline()).decode().strip()
        self.session.update(self.addresses)

    async def kill(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        await process.wait()


@in_loop
async def test_every_stream_survives_20_kills() -> None:
    chance = random.Random(7)
    over = asyncio.Event()
    pauses: list[float] = []
    ids = count()
    went_on = [asyncio.Event() for _ in range(STREAMS)]

    async def stream(session: Session, number: int) -> None:
        """One request after the other until the killing is over, and one more."""
        last = False
        while not last:
            last = over.is_set()
            index = next(ids)
            params = SamplingParams(max_tokens=chance.randint(1, 200), temperature=0.8, seed=index)
            prompt_ids = [index, *range(chance.randint(0, 50))]
            tokens: list[int] = []
            pause, before = 0.0, time.monotonic()
            async for output in session.generate(prompt_ids, params):
                tokens.extend(output.token_ids)
                went_on[number].set()
                pause, before = max(pause, time.monotonic() - before), time.monotonic()
            pauses.append(pause)
            assert tokens == expected(prompt_ids, params)

    async def every_stream_goes_on() -> None:
        for event in went_on:
            event.clear()
        await asyncio.gather(*(event.wait() for event in went_on))

    async with Session(CREDENTIALS, rejoin_timeout_s=25) as session:
        routers = Routers(session)
        await asyncio.gather(routers.spawn("router-0"), routers.spawn("router-1"))
        streams = [asyncio.create_task(stream(session, number)) for number in range(STREAMS)]
        losses = 0  # that one request can have had in a row: with one more it would be taken for their reason
        try:
            for _ in range(KILLS):
                await asyncio.sleep(chance.uniform(0.0, 0.3))
                victims = chance.sample(sorted(routers.processes), chance.choice((1, 1, 1, 2)))
                if losses + len(victims) >= MAX_LOSSES:
                    await asyncio.wait_for(every_stream_goes_on(), 60)
                    losses = 0
                losses += len(victims)
                await asyncio.gather(*map(routers.kill, victims))
                await asyncio.gather(*map(routers.spawn, victims))
            over.set()
            await asyncio.gather(*streams)
            stats = session.stats()
            assert stats.fail_overs > 0 and stats.open == 0
            pauses.sort()
            print(
                f"{len(pauses)} streams, {stats.fail_overs} fail-overs; longest pause of a stream: "
                f"median {pauses[len(pauses) // 2]:.3f} s, maximum {pauses[-1]:.3f} s"
            )
        finally:
            for name in routers.processes:
                await routers.kill(name)


@in_loop
async def test_a_router_that_is_frozen_does_not_hold_its_streams() -> None:
    """Its connection stays open and silent, which only a keepalive tells from a long step."""
    params = SamplingParams(max_tokens=100)
    async with Session(CREDENTIALS) as session:
        routers = Routers(session)
        await routers.spawn("router-0")
        try:
            outputs = session.generate([1], params)
            tokens = [*(await anext(outputs)).token_ids]
            routers.processes["router-0"].send_signal(signal.SIGSTOP)
            await routers.spawn("router-1")
            async for output in outputs:
                tokens.extend(output.token_ids)
            assert tokens == expected([1], params)
        finally:
            for name in routers.processes:
                await routers.kill(name)
