"""The gateway's session against real routers on loopback: no token lost, none twice, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from cluster.errors import RequestError
from cluster.gateway.journal import Entry
from cluster.gateway.session import Session
from cluster.gateway.suspects import MAX_LOSSES
from cluster.gateway.tenants import Tenant, tenant
from cluster.router.admission import Admission
from cluster.router.params import SamplingParams, StepOutput, TokenLogprobs
from cluster.router.service import GenerationService
from tests.credentials import CREDENTIALS
from tests.fake_engine import FakeEngine, expected
from tests.loop import in_loop, until


class Router:
    """One generation service around a fake engine."""

    def __init__(self, name: str, engine: FakeEngine) -> None:
        self.engine = engine
        self.service = GenerationService(engine, "127.0.0.1", router=name, credentials=CREDENTIALS)

    async def stop(self) -> None:
        self.engine.gate.set()
        await self.service.stop()


@asynccontextmanager
async def cluster(*engines: FakeEngine, rejoin_timeout_s: float = 30.0) -> AsyncIterator[tuple[Session, list[Router]]]:
    """A session connected to one router for each engine."""
    routers = [Router(f"router-{index}", engine) for index, engine in enumerate(engines)]
    async with AsyncExitStack() as stack:
        for router in routers:
            await router.service.start()
            stack.push_async_callback(router.stop)
        session = await stack.enter_async_context(
            Session(CREDENTIALS, view(routers), rejoin_timeout_s=rejoin_timeout_s)
        )
        await until(lambda: all(stream.state == "ready" for stream in session.stats().streams))
        yield session, routers


def view(routers: Sequence[Router]) -> dict[str, str]:
    return {router.service.router: router.service.address for router in routers}


async def tokens_of(session: Session, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
    return [token async for output in session.generate(prompt_ids, params) for token in output.token_ids]


def start(session: Session, requests: int, params: SamplingParams) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(tokens_of(session, [index, 7], params)) for index in range(requests)]


async def assert_undisturbed(tasks: Sequence[asyncio.Task[list[int]]], params: SamplingParams) -> None:
    for index, tokens in enumerate(await asyncio.gather(*tasks)):
        assert tokens == expected([index, 7], params)


@in_loop
async def test_requests_are_spread_over_the_routers_and_end_with_their_tokens() -> None:
    params = SamplingParams(max_tokens=30, seed=3)
    async with cluster(FakeEngine(), FakeEngine()) as (session, routers):
        await assert_undisturbed(start(session, 10, params), params)
        assert [len(router.engine.submitted) for router in routers] == [5, 5]
        stats = session.stats()
        assert (stats.open, stats.requests, stats.tokens, stats.fail_overs) == (0, 10, 300, 0)


@in_loop
async def test_a_lost_router_leaves_neither_gap_nor_repeat() -> None:
    params = SamplingParams(max_tokens=60, seed=3, temperature=0.7)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        tasks = start(session, 8, params)
        await until(lambda: session.stats().tokens > 80)
        await routers[0].stop()
        await assert_undisturbed(tasks, params)
        assert session.stats().fail_overs == 4
        for _, continued, emitted in routers[1].engine.submitted[4:]:
            assert continued == params and emitted


@in_loop
async def test_prompt_logprobs_come_once_also_over_a_fail_over() -> None:
    params = SamplingParams(max_tokens=60, logprobs=2, prompt_logprobs=0)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        outputs: list[StepOutput] = []
        async for output in session.generate([4, 5, 6], params):
            outputs.append(output)
            if len(outputs) == 10:
                await next(router for router in routers if router.engine.sequences).stop()
        assert outputs[0].prompt_logprobs == (None, TokenLogprobs(-5.0), TokenLogprobs(-6.0))
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        assert all(len(output.logprobs) == len(output.token_ids) for output in outputs)
        assert sum((output.token_ids for output in outputs), ()) == tuple(expected([4, 5, 6], params))
        assert outputs[-1].finish == "length"


@in_loop
async def test_requests_wait_for_a_router_and_go_on_when_one_comes() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002)) as (session, [first]):
        tasks = start(session, 4, params)
        await until(lambda: session.stats().tokens > 40)
        await first.stop()
        await until(lambda: session.stats().waiting == 4)
        assert not session.ready()
        second = Router("router-0", FakeEngine())  # restarted: the same id at another address
        await second.service.start()
        session.update(view([second]))
        await assert_undisturbed(tasks, params)
        assert [stream.address for stream in session.stats().streams] == [second.service.address]
        await second.stop()


@in_loop
async def test_a_router_that_restarts_at_its_address_is_found_again() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002)) as (session, [first]):
        tasks = start(session, 2, params)
        await until(lambda: session.stats().tokens > 20)
        await first.stop()
        second = GenerationService(
            FakeEngine(), "127.0.0.1", int(first.service.address.rsplit(":", 1)[1]), credentials=CREDENTIALS
        )
        await second.start()
        await assert_undisturbed(tasks, params)
        await second.stop()


@in_loop
async def test_without_a_router_the_wait_has_an_end() -> None:
    async with Session(CREDENTIALS, rejoin_timeout_s=0.05) as session:
        with pytest.raises(RequestError, match="no router") as caught:
            await tokens_of(session, [1], SamplingParams(max_tokens=1))
        assert (caught.value.status, caught.value.code) == (503, "service_unavailable")
        assert session.stats().open == session.stats().waiting == 0


@in_loop
async def test_a_draining_router_keeps_its_requests_and_gets_no_new_ones() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        tasks = start(session, 4, params)
        await until(lambda: session.stats().tokens > 20)
        drained = asyncio.create_task(routers[0].service.drain(30))
        await asyncio.sleep(0)
        late = [asyncio.create_task(tokens_of(session, [9], params)) for _ in range(4)]
        assert await drained
        await assert_undisturbed(tasks, params)
        assert await asyncio.gather(*late) == [expected([9], params)] * 4
        assert len(routers[0].engine.submitted) == 2
        assert session.stats().fail_overs == 0


@in_loop
async def test_what_outlives_the_drain_goes_on_elsewhere() -> None:
    params = SamplingParams(max_tokens=100)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        tasks = start(session, 4, params)
        await until(lambda: session.stats().tokens > 20)
        assert not await routers[0].service.drain(0.01)
        await routers[0].stop()
        await assert_undisturbed(tasks, params)


@in_loop
async def test_a_router_that_left_the_view_finishes_what_it_has() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        tasks = start(session, 4, params)
        await until(lambda: session.stats().tokens > 20)
        session.update(view(routers[1:]))
        await assert_undisturbed(tasks, params)
        assert session.stats().fail_overs == 0
        assert [stream.router for stream in session.stats().streams] == ["router-1"]


@in_loop
async def test_a_router_that_a_view_lacked_for_a_moment_takes_what_waited() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002)) as (session, routers):
        tasks = start(session, 1, params)
        await until(lambda: session.stats().tokens > 5)
        session.update({})
        late = asyncio.create_task(tokens_of(session, [9], params))
        await until(lambda: session.stats().waiting == 1)
        session.update(view(routers))
        assert session.stats().waiting == 0
        assert await late == expected([9], params)
        await assert_undisturbed(tasks, params)


@in_loop
async def test_a_full_queue_beside_a_router_that_leaves_is_a_refusal() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(max_queue=0)) as (session, routers):
        tasks = start(session, 1, params)
        await until(lambda: session.stats().tokens > 5)
        session.update(view(routers[1:]))
        with pytest.raises(RequestError, match="too many"):
            await tokens_of(session, [1], params)
        await assert_undisturbed(tasks, params)


@in_loop
async def test_a_full_queue_beside_a_router_that_just_drains_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(FakeEngine(max_queue=0), FakeEngine()) as (session, [_, draining]):
        loop = asyncio.get_running_loop()

        def submit(*_: object) -> None:
            asyncio.run_coroutine_threadsafe(draining.service.set_state("draining"), loop).result(60)
            raise RequestError("this router is being stopped", code="draining", status=503)

        monkeypatch.setattr(draining.engine, "submit", submit)
        with pytest.raises(RequestError, match="too many"):
            await tokens_of(session, [1], SamplingParams(max_tokens=2))


@in_loop
async def test_a_full_queue_sends_a_request_to_the_next_router_and_then_refuses_it() -> None:
    params = SamplingParams(max_tokens=2)
    async with cluster(FakeEngine(max_queue=0), FakeEngine()) as (session, routers):
        assert await tokens_of(session, [1], params) == expected([1], params)
        assert await tokens_of(session, [1], params) == expected([1], params)
        routers[1].engine.max_queue = 0
        with pytest.raises(RequestError) as caught:
            await tokens_of(session, [1], params)
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "queue_full", 3)


@in_loop
async def test_a_continued_request_waits_for_room_instead_of_being_refused() -> None:
    params = SamplingParams(max_tokens=60)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(max_queue=0)) as (session, routers):
        tasks = start(session, 4, params)
        await until(lambda: session.stats().tokens > 20)
        await routers[0].stop()
        await asyncio.sleep(0.05)
        routers[1].engine.max_queue = 10
        await assert_undisturbed(tasks, params)


@in_loop
async def test_other_refusals_reach_the_client_as_they_are() -> None:
    async with cluster(FakeEngine(), FakeEngine()) as (session, _):
        with pytest.raises(RequestError) as caught:
            await tokens_of(session, [1] * 1001, SamplingParams(max_tokens=1))
        assert (caught.value.code, caught.value.param, caught.value.status) == (
            "context_length_exceeded", "prompt", 400,
        )  # fmt: skip


@in_loop
async def test_a_client_that_leaves_frees_its_sequence() -> None:
    params = SamplingParams(max_tokens=10**6)
    async with cluster(FakeEngine(step_s=0.001)) as (session, [router]):
        async with aclosing(session.generate([1], params)) as outputs:
            async for _ in outputs:
                break
        await until(lambda: router.engine.cancelled == 1)
        [task] = start(session, 1, params)
        await until(lambda: session.stats().tokens > 10)
        task.cancel()
        await until(lambda: router.engine.cancelled == 2)
        assert session.stats().open == 0 and not router.engine.sequences and not router.service.n_open


@in_loop
async def test_a_client_that_leaves_while_there_is_no_router_is_forgotten() -> None:
    async with Session(CREDENTIALS) as session:
        [task] = start(session, 1, SamplingParams(max_tokens=1))
        await until(lambda: session.stats().waiting == 1)
        task.cancel()
        await until(lambda: session.stats().waiting == session.stats().open == 0)


@in_loop
async def test_a_request_that_takes_routers_down_is_given_up_and_no_other_is() -> None:
    """Would catch a request that goes on killing, and one that is blamed because it was there."""
    params = SamplingParams(max_tokens=5, seed=3)
    engines = [FakeEngine() for _ in range(2 * MAX_LOSSES)]
    for engine in engines:
        engine.gate.clear()
    poison = (666, 7)
    async with cluster(*engines[:1]) as (session, [router]):
        victim = asyncio.create_task(tokens_of(session, poison, params))
        others = start(session, 4, params)
        dead = 0
        while not victim.done():
            await until(lambda router=router: router.service.n_open or victim.done())  # type: ignore[misc]
            await asyncio.sleep(0.05)  # whoever else is placed there now
            if not any(poison == sequence.prompt_ids for sequence in router.engine.sequences.values()):
                router.engine.gate.set()  # a router without it works
                await until(lambda router=router: not router.service.n_open or victim.done())  # type: ignore[misc]
                router.engine.gate.clear()
                continue
            stopping = asyncio.create_task(router.service.stop())
            await until(lambda router=router: not router.service.n_open)  # type: ignore[misc]
            router.engine.gate.set()  # the step that it held up belongs to nobody any more
            await stopping
            dead += 1
            router = Router(f"router-{dead}", engines[dead])
            await router.service.start()
            session.update(view([router]))
        with pytest.raises(RequestError, match="in a row"):
            await victim
        assert dead == MAX_LOSSES
        router.engine.gate.set()
        await assert_undisturbed(others, params)
        await router.stop()


@in_loop
async def test_closing_the_session_ends_its_requests_with_an_error() -> None:
    async with cluster(FakeEngine(step_s=0.001)) as (session, [router]):
        tasks = start(session, 3, SamplingParams(max_tokens=10**6))
        await until(lambda: len(router.engine.sequences) == 3)
        await session.close()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(error, "status", None) for error in errors] == [503] * 3
        await until(lambda: not router.engine.sequences)


def test_the_journal_ends_what_had_all_its_tokens_when_the_router_died() -> None:
    async def main() -> None:
        entry = Entry("0", [1], SamplingParams(max_tokens=2, prompt_logprobs=0))
        assert not entry.end_by_length()
        entry.record(StepOutput("0", (5,), prompt_logprobs=(None,)))
        assert not entry.end_by_length()
        assert not entry.submit().submit.sampling.HasField("prompt_logprobs")
        entry.record(StepOutput("0", (6,)))
        assert entry.end_by_length()
        assert [entry.outputs.get_nowait() for _ in range(3)][-1] == StepOutput("0", (), finish="length")

    asyncio.run(main())


@in_loop
async def test_nothing_leaks_over_500_requests_of_which_half_are_cancelled() -> None:
    chance = random.Random(1)
    params = SamplingParams(max_tokens=20)
    async with cluster(FakeEngine(step_s=0.001), FakeEngine(step_s=0.001)) as (session, routers):

        async def request(index: int) -> None:
            stop_after = chance.randrange(20) if index % 2 else None
            task = asyncio.create_task(tokens_of(session, [index], params))
            if stop_after is None:
                assert await task == expected([index], params)
            else:
                await asyncio.sleep(stop_after * 0.001)
                task.cancel()

        await asyncio.gather(*(request(index) for index in range(20)))
        await until(lambda: session.stats().open == 0)
        tasks, files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        for batch in range(10):
            await asyncio.gather(*(request(batch * 50 + index) for index in range(50)))
        await until(lambda: all(not router.engine.sequences for router in routers))
        assert (len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))) == (tasks, files)
        assert session.stats().open == session.stats().waiting == 0
        assert all(stream.requests == 0 for stream in session.stats().streams)
        assert all(not router.service.n_open and router.service.n_gateways == 1 for router in routers)
    await until(lambda: len(asyncio.all_tasks()) == 2)  # the test's own and the limit around it


@in_loop
async def test_requests_of_a_router_that_is_isolated_go_on_elsewhere_and_it_gets_none_until_it_is_ready_again() -> None:
    params = SamplingParams(max_tokens=100, seed=3)
    async with cluster(FakeEngine(step_s=0.01), FakeEngine(step_s=0.01)) as (session, routers):
        tasks = start(session, 6, params)
        await until(lambda: session.stats().tokens > 60)
        await routers[0].service.isolate()
        await assert_undisturbed(tasks, params)
        assert session.stats().fail_overs == 3
        before = len(routers[0].engine.submitted)
        await until(lambda: [each.state for each in session.stats().streams] == ["isolated", "ready"])
        short = SamplingParams(max_tokens=5, seed=3)
        await assert_undisturbed(start(session, 4, short), short)
        assert len(routers[0].engine.submitted) == before
        await routers[0].service.set_state("ready")
        await until(lambda: all(each.state == "ready" for each in session.stats().streams))
        await assert_undisturbed(start(session, 4, short), short)
        assert len(routers[0].engine.submitted) == before + 2


@asynccontextmanager
async def small_router(*, gateways: int) -> AsyncIterator[tuple[GenerationService, list[Session]]]:
    """A router with 2 seats and 3 places, which computes once its engine's gate is open, and sessions to it."""
    engine = FakeEngine()
    engine.gate.clear()
    service = GenerationService(engine, "127.0.0.1", router="r", credentials=CREDENTIALS, admission=Admission(2, 3, 30))
    await service.start()
    async with AsyncExitStack() as stack:
        view = {"r": service.address}
        sessions = [await stack.enter_async_context(Session(CREDENTIALS, view)) for _ in range(gateways)]
        await until(lambda: all(session.ready() for session in sessions))
        yield service, sessions
        engine.gate.set()
    await service.stop()


@in_loop
async def test_what_a_router_would_refuse_is_refused_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=5)
    async with small_router(gateways=1) as (service, [session]):
        tasks = start(session, 5, params)
        await until(lambda: service.n_open == 5)
        with monkeypatch.context() as patched:
            asked: list[object] = []
            patched.setattr(service, "_submit", lambda *command: asked.append(command))
            for _ in range(3):
                with pytest.raises(RequestError, match="waiting already") as caught:
                    await tokens_of(session, [1], params)
                assert (caught.value.code, caught.value.status) == ("queue_full", 429) and caught.value.retry_after_s
            assert not asked
        service._engine.gate.set()
        await assert_undisturbed(tasks, params)
        await until(lambda: session._streams[0].refuse("") is None)
        assert await tokens_of(session, [1, 7], params) == expected([1, 7], params)


@in_loop
async def test_gateways_that_counted_on_the_same_place_learn_better() -> None:
    """Else one that counts a request which the router refused would refuse for ever."""
    params = SamplingParams(max_tokens=5)
    async with small_router(gateways=2) as (service, sessions):
        tasks = [task for session in sessions for task in start(session, 5, params)]
        await until(lambda: sum(task.done() for task in tasks) == 5)
        assert service.n_open == 5
        queues = [session._streams[0] for session in sessions]
        await until(lambda: all(stream.queue is not None and stream.queue.n_open == 5 for stream in queues))
        service._engine.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, RequestError) and result.code == "queue_full" for result in results) == 5
        for session in sessions:
            await until(lambda stream=session._streams[0]: stream.refuse("") is None)
            assert await tokens_of(session, [1, 7], params) == expected([1, 7], params)


@in_loop
async def test_requests_tell_whose_they_are() -> None:
    async with cluster(FakeEngine()) as (session, [router]):
        tenant.set(Tenant("search"))
        await tokens_of(session, [1], SamplingParams(max_tokens=2))
        tenant.set(None)
        await tokens_of(session, [1], SamplingParams(max_tokens=2))
        assert [params.tenant for _, params, _ in router.engine.submitted] == ["search", ""]


@in_loop
async def test_conversations_go_back_to_the_router_that_has_their_beginning() -> None:
    params = SamplingParams(max_tokens=3)
    async with cluster(FakeEngine(step_s=0.002), FakeEngine(step_s=0.002)) as (session, routers):
        prompts = {1: [1] * 100, 2: [2] * 100}
        prompts[1] += await tokens_of(session, prompts[1], params)  # to the first: both have nothing to do
        another = session.generate([9], SamplingParams(max_tokens=100_000))
        for _ in range(3):
            await anext(another)  # runs on the first, which has the second router answer what is new
            for name, prompt in prompts.items():
                prompt += await tokens_of(session, prompt, params) + [name] * 50
        await another.aclose()
        for name, prompt in prompts.items():
            prompt += await tokens_of(session, prompt, params) + [name] * 50
        asked = [[prompt[0] for prompt, _, _ in router.engine.submitted] for router in routers]
        assert asked == [[1, 9, 1, 1, 1, 1], [2, 2, 2, 2]]


@in_loop
async def test_a_router_that_is_clearly_busier_is_passed_over_whatever_is_in_its_cache() -> None:
    params, prompt = SamplingParams(max_tokens=1000), [3] * 200
    async with cluster(FakeEngine(step_s=0.01), FakeEngine(step_s=0.01)) as (session, _):
        tasks: list[asyncio.Task[list[int]]] = []
        open_on: list[list[int]] = []
        for index in range(4):
            tasks.append(asyncio.create_task(tokens_of(session, [*prompt, index], params)))
            await until(lambda: session.stats().requests == len(tasks))
            open_on.append(sorted(stream.requests for stream in session.stats().streams))
        assert open_on == [[0, 1], [0, 2], [1, 2], [2, 2]]  # the second has the prompt too, and fewer requests
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@in_loop
async def test_what_a_lost_router_had_in_its_cache_counts_no_more() -> None:
    params, prompt = SamplingParams(max_tokens=2), [3] * 200
    async with cluster(FakeEngine(), FakeEngine()) as (session, routers):
        await tokens_of(session, prompt, params)
        first = next(router for router in routers if router.engine.submitted)
        await first.stop()
        await tokens_of(session, prompt, params)
        again = GenerationService(
            FakeEngine(),
            "127.0.0.1",
            int(first.service.address.rsplit(":", 1)[1]),
            router=first.service.router,
            credentials=CREDENTIALS,
        )
        await again.start()
        await until(lambda: all(stream.state == "ready" for stream in session.stats().streams))
        for _ in range(3):
            await tokens_of(session, [*prompt, 9], params)
        second = next(router for router in routers if router is not first)
        assert len(second.engine.submitted) == 4
        await again.stop()
