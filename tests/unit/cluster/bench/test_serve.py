"""The load generator: would catch a figure that is not what the clients saw, and an error that is not counted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from cluster.bench.gateway import Client
from cluster.bench.load import Arrival, Gateway, Record, Routers, closed_loop, follow, make_prompts, open_loop
from cluster.bench.serve import serve, summary
from cluster.bench.sse_client import HTTPError, post_events
from cluster.fleet.run_state import RunState, credentials_path, since_boot
from cluster.gateway.session import Session
from cluster.router.service import GenerationService
from tests.credentials import CREDENTIALS
from tests.fake_engine import FakeEngine
from tests.loop import in_loop

ROOT = Path(__file__).resolve().parents[4]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def ignore() -> None:
    pass


@asynccontextmanager
async def answering(*segments: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that sends `segments` one after the other and hangs up; what it was sent is on record."""
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        requests.append(head + await reader.readexactly(length))
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@in_loop
async def test_events_are_whole_however_the_bytes_are_cut() -> None:
    values = [{"n": index, "text": "é" * index} for index in range(20)]
    body = b"".join(event(value) for value in values) + b"data: [DONE]\n\n"
    chunked = b"".join(chunk(body[at : at + 37]) for at in range(0, len(body), 37)) + b"0\r\n\r\n"
    message = OK + chunked
    for size in (11, 100, len(message)):
        async with answering(*(message[at : at + size] for at in range(0, len(message), size))) as (url, _):
            assert [value async for value in post_events(url + "/x", {}, b"{}")] == values


@in_loop
async def test_a_refusal_and_a_stream_that_breaks_off_are_errors() -> None:
    refusal = json.dumps({"error": {"code": "queue_full", "message": "later"}}).encode()
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n" % len(refusal)
    async with answering(head + refusal) as (url, _):
        with pytest.raises(HTTPError, match="429") as caught:
            await anext(post_events(url, {}, b""))
        assert caught.value.code == "queue_full"
        assert (await follow(Gateway(Client(url, None, "m"), "chat"), [1], 2, 0.0)).error == "queue_full"

    text = {"choices": [{"text": "a"}]}
    async with answering(OK + chunk(event(text))) as (url, _):
        record = await follow(Gateway(Client(url, None, "m"), "completions"), [1], 2, 0.0)
        assert len(record.arrivals) == 1 and record.error
    async with answering(OK + chunk(event(text) + event({"error": {"code": "internal_error"}}))) as (url, _):
        assert (await follow(Gateway(Client(url, None, "m"), "completions"), [1], 2, 0.0)).error == "internal_error"


@in_loop
async def test_a_gateway_is_asked_for_an_exact_number_of_tokens_and_its_usage_is_believed() -> None:
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 3}},
    ]
    segments = [OK, *(chunk(event(value)) for value in events), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    async with answering(*segments) as (url, requests):
        record = await follow(Gateway(Client(url, "secret", "m"), "chat"), [1, 2], 3, 0.0)
    assert (record.error, record.tokens, len(record.arrivals)) == (None, 3, 2)
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert b"/v1/chat/completions" in head and b"Bearer secret" in head
    asked = json.loads(body)
    assert (asked["max_tokens"], asked["ignore_eos"], asked["messages"][0]["content"]) == (3, True, "1 2")


@in_loop
async def test_both_loops_run_every_request_over_the_routers() -> None:
    engine = FakeEngine()
    service = GenerationService(engine, "127.0.0.1", credentials=CREDENTIALS)
    await service.start()
    prompts = make_prompts(20, 5, seed=0)
    async with Session(CREDENTIALS, {"router-0": service.address}) as session:
        target = Routers(session)
        runs: list[Callable[[], Any]] = [
            lambda: closed_loop(target, prompts, 10, 4, ignore),
            lambda: open_loop(target, prompts, 10, 500.0, 1, ignore),
        ]
        for run in runs:
            result = summary(await run())
            assert (result["requests"], result["tokens"], result["errors"]) == (20, 200, {})
    assert sorted(prompt for prompt, _, _ in engine.submitted) == sorted(map(tuple, prompts + prompts))
    await service.stop()


@in_loop
async def test_a_closed_loop_keeps_to_its_clients_and_an_open_loop_to_its_clock() -> None:
    class Slow:
        running = most = 0

        async def request(self, prompt_ids: Sequence[int], max_tokens: int) -> AsyncIterator[Arrival]:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.02)
            yield Arrival(True, max_tokens)
            self.running -= 1

    slow: Any = Slow()
    await closed_loop(slow, [[1]] * 12, 1, 3, ignore)
    assert slow.most == 3
    slow.most = 0
    records = await open_loop(slow, [[1]] * 12, 1, 1e6, 0, ignore)
    assert slow.most == 12
    assert [record.due for record in records] == sorted(record.due for record in records)


def test_the_figures_are_those_of_the_records() -> None:
    records = [
        Record(due=0.0, arrivals=[1.0, 1.5, 3.0], end=3.0, tokens=3),
        Record(due=1.0, arrivals=[1.5, 2.0], end=4.0, tokens=2),
        Record(due=2.0, end=2.5, error="queue_full"),
    ]
    result = summary(records)
    assert (result["duration_s"], result["tokens_per_s"], result["max_pause_s"]) == (4.0, 1.25, 1.5)
    assert result["errors"] == {"queue_full": 1}
    assert result["ttft_s"] == {"p50": 0.75, "p90": pytest.approx(0.95), "p99": pytest.approx(0.995), "max": 1.0}
    assert result["itl_s"]["p50"] == 0.5
    assert summary([Record(due=0.0, end=1.0, error="x")])["ttft_s"] is None


def test_the_command_prints_one_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a router that this user's cluster has, with the credentials that the cluster left for its user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    process = psutil.Process()
    run_dir = str(tmp_path)
    state = RunState(process.pid, since_boot(process), "", 8000, "", run_dir, "tiny", "grpc", "as configured")
    state.write()
    CREDENTIALS.write(credentials_path(tmp_path))
    command = [sys.executable, "-m", "tests.fake_router", "router-7", "0.001"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as router:
        try:
            assert router.stdout is not None
            address = router.stdout.readline().decode().strip()
            known = {"written": time.time(), "run_dir": run_dir}
            known |= {"processes": [{"role": "router", "id": "router-7", "address": address}]}
            (tmp_path / "status.json").write_text(json.dumps(known))
            app = typer.Typer()
            app.command()(serve)
            options = ["--requests", "6", "--concurrency", "3", "--tokens", "5", "--json"]
            run = CliRunner().invoke(app, ["--router", address, *options])
            unknown = CliRunner().invoke(app, ["--router", "127.0.0.1:1", *options])
        finally:
            router.kill()
    assert address in str(unknown.exception)
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert (result["tokens"], result["endpoint"], result["errors"]) == (30, "router", {})
