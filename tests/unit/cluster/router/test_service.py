"""The generation service over real gRPC: what a gateway sees of one router, and what the engine sees of gateways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import RequestError, StartError
from cluster.router import service as service_module
from cluster.router.codec import (
    ROUTER_KEY,
    decode_output,
    decode_refusal,
    decode_sampling,
    encode_cancel,
    encode_submit,
)
from cluster.router.gateway_stream import GatewayStream
from cluster.router.params import SamplingParams, StepOutput, TokenLogprobs
from cluster.router.service import GenerationService
from tests.credentials import CREDENTIALS
from tests.fake_engine import FakeEngine, expected
from tests.loop import in_loop, until
from workers.pb import generation_pb2 as pb
from workers.pb import generation_pb2_grpc

Call = Any


@asynccontextmanager
async def serving(engine: FakeEngine, **options: Any) -> AsyncIterator[GenerationService]:
    service = GenerationService(engine, "127.0.0.1", credentials=CREDENTIALS, **options)
    await service.start()
    try:
        yield service
    finally:
        engine.gate.set()
        await service.stop()


@asynccontextmanager
async def stub_of(service: GenerationService) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


async def opened(stub: Any, router: str = "router-0") -> Call:
    """A stream whose first event, the router's state, was read."""
    call = stub.Stream(metadata=(*CREDENTIALS.metadata, (ROUTER_KEY, router)))
    assert (await call.read()).state == "ready"
    return call


async def outputs_until_finish(call: Call, requests: int) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    finished = 0
    while finished < requests:
        for output in (await call.read()).outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            finished += output.finish != ""
    return tokens


@contextmanager
def closed_gate(engine: FakeEngine) -> Iterator[None]:
    """Steps started meanwhile block, as while an expert worker is awaited."""
    engine.gate.clear()
    try:
        yield
    finally:
        engine.gate.set()


def test_parameters_and_logprobs_survive_the_wire() -> None:
    params = SamplingParams(
        max_tokens=7, temperature=0.1, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.1, presence_penalty=-0.5,
        frequency_penalty=0.25, logit_bias={5: -100.0, 7: 1.5}, seed=2**64 - 1, stop_ids=(2, 9), ignore_eos=True,
        min_tokens=3, logprobs=0, prompt_logprobs=2,
    )  # fmt: skip
    submit = encode_submit("a", [1, 2, 3], params, [4]).submit
    assert decode_sampling(pb.Submit.FromString(submit.SerializeToString()).sampling) == params
    assert decode_sampling(encode_submit("a", [1], SamplingParams(1)).submit.sampling) == SamplingParams(1)

    first = TokenLogprobs(-0.5, ((8, -0.5), (9, -1.5)))
    output = StepOutput("a", (8,), (first,), (None, TokenLogprobs(-2.0)))
    outbox = GatewayStream()
    outbox.put("a", output)
    outbox.put("a", replace(output, prompt_logprobs=None, finish="stop"))
    event = asyncio.run(outbox.take())
    assert event is not None
    [message] = event.outputs
    assert decode_output(message) == StepOutput("a", (8, 8), (first, first), output.prompt_logprobs, "stop")


@in_loop
async def test_what_a_slow_gateway_left_unread_is_cut_into_events_of_a_bounded_size() -> None:
    top = tuple((32000 + i, -0.5 - i) for i in range(20))
    params = SamplingParams(max_tokens=300)
    steps = [expected([request], params) for request in range(40)]
    outbox = GatewayStream()
    outbox.put("scored", StepOutput("scored", (), (), (None, *[TokenLogprobs(-1.0, top)] * 9000)))
    for position in range(300):
        for request, tokens in enumerate(steps):
            name = str(request)
            outbox.put(name, StepOutput(name, (tokens[position],), (TokenLogprobs(-0.5, top),)))
    outbox.refuse("0", RequestError("no more", code="internal_error"))
    waiting = outbox.pending_bytes
    assert outbox.pending_tokens == 40 * 300
    events: list[pb.Event] = []
    while outbox.pending_bytes:
        event = await outbox.take()
        assert event is not None
        events.append(event)
    sizes = [event.ByteSize() for event in events]
    assert max(sizes[1:]) < 1.1 * 2**20 < sizes[0] < 4 * 2**20, sizes  # one output of one step is never cut
    assert 0.5 * waiting < sum(sizes) <= waiting
    outputs = [output for event in events for output in event.outputs]
    for request, tokens in enumerate(steps):
        assert [t for output in outputs if output.request_id == str(request) for t in output.token_ids] == tokens
    ends = [(output.request_id, output.finish) for output in outputs if output.finish]
    assert (ends, outbox.pending_tokens) == ([("0", "error")], 0)


@in_loop
async def test_tokens_of_one_step_travel_in_one_event() -> None:
    engine = FakeEngine()
    params = SamplingParams(max_tokens=3, seed=5)
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        with closed_gate(engine):
            for index in range(8):
                await call.write(encode_submit(str(index), [index], params))
            await until(lambda: service.n_open == 8)
        events = [await call.read()]
        while sum(output.finish != "" for event in events for output in event.outputs) < 8:
            events.append(await call.read())
        # The first step ran with the first request alone; the rest were admitted before the second.
        assert len(events) <= 4
        for index in range(8):
            tokens = [t for e in events for o in e.outputs if o.request_id == str(index) for t in o.token_ids]
            assert tokens == expected([index], params)


@in_loop
async def test_two_gateways_may_use_the_same_request_ids() -> None:
    async with serving(FakeEngine()) as service, stub_of(service) as one, stub_of(service) as two:
        calls = [await opened(one), await opened(two)]
        params = SamplingParams(max_tokens=20)
        for index, call in enumerate(calls):
            await call.write(encode_submit("0", [index], params))
        for index, call in enumerate(calls):
            assert await outputs_until_finish(call, 1) == {"0": expected([index], params)}


@in_loop
async def test_an_idle_engine_is_not_polled() -> None:
    class Counting(FakeEngine):
        asked = 0

        def has_work(self) -> bool:
            self.asked += 1
            return super().has_work()

    engine = Counting()
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
        await outputs_until_finish(call, 1)
        await asyncio.sleep(0.05)
        asked = engine.asked
        await asyncio.sleep(0.3)
        assert engine.asked == asked


@in_loop
async def test_cancel_and_a_broken_stream_free_the_sequences() -> None:
    engine = FakeEngine(step_s=0.001)
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        for index in range(4):
            await call.write(encode_submit(str(index), [index], SamplingParams(max_tokens=10**6)))
        await until(lambda: len(engine.sequences) == 4)
        await call.write(encode_cancel("1"))
        await call.write(encode_cancel("no such request"))
        await until(lambda: engine.cancelled == 1)
        call.cancel()
        await until(lambda: not engine.sequences)
        assert not service.n_open and not service.n_gateways


@in_loop
async def test_a_cancellation_does_not_wait_for_a_step_that_is_stuck() -> None:
    engine = FakeEngine()
    async with serving(engine) as service, stub_of(service) as stub, stub_of(service) as other:
        call, gone = await opened(stub), await opened(other)
        params = SamplingParams(max_tokens=10**6)
        for name in "ab":
            await call.write(encode_submit(name, [1], params))
        await gone.write(encode_submit("c", [1], params))
        await until(lambda: len(engine.sequences) == 3)
        with closed_gate(engine):
            await call.write(encode_submit("late", [2], params))  # the engine has not even seen it
            await call.write(encode_cancel("a"))
            await call.write(encode_cancel("late"))
            gone.cancel()
            await until(lambda: len(engine.sequences) == 1 and service.n_open == 1)
        await until(lambda: engine.submitted[-1][0] == (2,) and len(engine.sequences) == 1)


@in_loop
async def test_a_gateway_that_does_not_read_neither_stops_the_steps_nor_loses_a_token() -> None:
    engine = FakeEngine()
    params = SamplingParams(max_tokens=2500, logprobs=1)
    async with serving(engine) as service, stub_of(service) as stub, stub_of(service) as other:
        slow, quick = await opened(stub), await opened(other)
        with closed_gate(engine):
            for index in range(8):
                await slow.write(encode_submit(str(index), [index], params))
            await quick.write(encode_submit("q", [1], params))
            await until(lambda: service.n_open == 9)
        assert await outputs_until_finish(quick, 1) == {"q": expected([1], params)}
        await until(lambda: not engine.sequences)  # the slow ones were computed to the end
        tokens = await outputs_until_finish(slow, 8)
        assert tokens == {str(index): expected([index], params) for index in range(8)}


@pytest.mark.parametrize(("limit", "value"), [("_MAX_PENDING_TOKENS", 100), ("_MAX_PENDING_BYTES", 10_000)])
@in_loop
async def test_a_gateway_that_never_reads_is_closed(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(service_module, limit, value)
    engine = FakeEngine()
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        with closed_gate(engine):
            for index in range(8):
                await call.write(encode_submit(str(index), [index], SamplingParams(max_tokens=10**9, logprobs=1)))
            await until(lambda: service.n_open == 8)
        await until(lambda: engine.cancelled == 8)
        while await call.read() is not grpc.aio.EOF:
            pass
        await until(lambda: not service.n_gateways)


@in_loop
async def test_refusals_carry_what_the_error_envelope_needs() -> None:
    engine = FakeEngine(max_queue=0)
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
        [output] = (await call.read()).outputs
        error = decode_refusal(output.refusal)
        assert (output.finish, error.code, error.status, error.retry_after_s) == ("error", "queue_full", 429, 3)
        engine.max_queue = 9
        await call.write(encode_submit("0", [1] * 1001, SamplingParams(max_tokens=2)))
        [output] = (await call.read()).outputs
        error = decode_refusal(output.refusal)
        assert (error.code, error.param, error.status) == ("context_length_exceeded", "prompt", 400)
        await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
        assert await outputs_until_finish(call, 1) == {"0": expected([1], SamplingParams(max_tokens=2))}


@in_loop
async def test_a_failed_step_ends_its_requests_and_nothing_else() -> None:
    engine = FakeEngine(fail_next_step=True)
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
        [output] = (await call.read()).outputs
        assert (output.finish, output.refusal.code, output.refusal.status) == ("error", "internal_error", 500)
        assert "the engine broke" in output.refusal.message
        assert not engine.sequences
        await call.write(encode_submit("1", [1], SamplingParams(max_tokens=2)))
        assert await outputs_until_finish(call, 1) == {"1": expected([1], SamplingParams(max_tokens=2))}


@in_loop
async def test_drain_lets_the_open_finish_and_refuses_the_new() -> None:
    engine = FakeEngine()
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        with closed_gate(engine):
            await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
            await until(lambda: service.n_open > 0)
            assert not await service.drain(0.01)
            assert (await call.read()).state == "draining"
            await call.write(encode_submit("1", [1], SamplingParams(max_tokens=2)))
            [output] = (await call.read()).outputs
            assert output.refusal.code == "draining"
        assert await service.drain(30)
        assert await outputs_until_finish(call, 1) == {"0": expected([1], SamplingParams(max_tokens=2))}


@in_loop
async def test_describe_and_health_answer_while_a_step_is_blocked() -> None:
    engine = FakeEngine()
    async with serving(engine, router="router-3") as service, stub_of(service) as stub:
        call = await opened(stub, "router-3")
        with closed_gate(engine):
            await call.write(encode_submit("0", [1], SamplingParams(max_tokens=2)))
            await until(lambda: bool(engine.sequences))
            reply = await stub.Describe(pb.DescribeRequest(), metadata=CREDENTIALS.metadata)
            assert (reply.router, reply.state, reply.running, list(reply.connected)) == (
                "router-3", "ready", 1, ["expert-0"],
            )  # fmt: skip
            async with grpc.aio.insecure_channel(service.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for state, status in (("ready", 1), ("starting", 2), ("draining", 2)):
                    await service.set_state(state)
                    reply = await health.Check(health_pb2.HealthCheckRequest(service=service_module.SERVICE))
                    assert reply.status == status


@in_loop
async def test_it_listens_on_its_address_alone_and_says_when_that_is_taken() -> None:
    async with serving(FakeEngine()) as service:
        port = int(service.address.rsplit(":", 1)[1])
        addresses = {
            connection.laddr.ip.removeprefix("::ffff:")
            for connection in psutil.Process().net_connections("inet")
            if connection.status == "LISTEN" and connection.laddr.port == port
        }
        assert addresses == {"127.0.0.1"}
        with pytest.raises(StartError, match=str(port)):
            await GenerationService(FakeEngine(), "127.0.0.1", port, credentials=CREDENTIALS).start()


@in_loop
async def test_stop_ends_a_stream_that_is_open() -> None:
    engine = FakeEngine(step_s=0.001)
    async with serving(engine) as service, stub_of(service) as stub:
        call = await opened(stub)
        await call.write(encode_submit("0", [1], SamplingParams(max_tokens=10**6)))
        await until(lambda: bool(engine.sequences))
        await service.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
