"""Would catch: a trace that breaks off between client, gateway, router and workers, spans outside of their parents,
spans when nobody asked for them, a prompt in a span."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from cluster.config import Config
from cluster.errors import StartError
from cluster.gateway.app import create_app
from cluster.gateway.context import ModelCard
from cluster.gateway.defaults import read_defaults
from cluster.gateway.session import Session
from cluster.gateway.tokenizer import Tokenizer
from cluster.observe import tracing
from cluster.placement.placement import striped
from cluster.router.build import build_engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams
from cluster.router.sequence import Sequence
from cluster.router.service import GenerationService
from cluster.router.spans import RouterSpans
from tests.contract.harness import GrpcWorkers, start_all
from tests.contract.test_same_bits import OnDisk
from tests.credentials import CREDENTIALS
from tests.loop import in_loop, until
from tests.reference import save_random
from workers.checkpoint import Checkpoint

export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTHER = "1af7651916cd43dd8448eb211c80319d"
CONFIG = Config(kv_cache_mb=16, block_size=4)
WORD = "zebrafish"


class Ended:
    """Spans that have ended, those that are made later included."""

    def __init__(self) -> None:
        self._exporter = memory.InMemorySpanExporter()
        self.start()

    def start(self) -> None:
        """Trace, from now on."""
        self._exporter.clear()
        tracing.install(export.SimpleSpanProcessor(self._exporter), "test")

    def take(self) -> tuple[Any, ...]:
        """Those so far; nothing is traced any more."""
        tracing.install(None, "test")
        spans: tuple[Any, ...] = self._exporter.get_finished_spans()
        return spans


@pytest.fixture
def spans() -> Iterator[Ended]:
    yield (ended := Ended())
    ended.take()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, byte_level_path: Path) -> Path:
    path = tmp_path_factory.mktemp("traced") / "random"
    save_random(path, vocab_size=Tokenizer(byte_level_path).vocab_size)
    return path


@asynccontextmanager
async def client_of(checkpoint: Path, tokenizer_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway, a router and two expert workers, in this process but over gRPC."""
    spec = Checkpoint(checkpoint).spec
    workers = GrpcWorkers(OnDisk(spec.n_layers, spec.n_experts, spec.hidden_size, spec.ffn_size, path=checkpoint))
    placement = striped(spec.n_layers, spec.n_experts, ("a", "b"))
    start_all(workers, placement)
    exchange = Exchange(placement, workers.addresses, workers.transport(), reply_timeout_s=60, rejoin_timeout_s=60)
    service = GenerationService(build_engine(CONFIG, checkpoint, exchange), "127.0.0.1", credentials=CREDENTIALS)
    await service.start()
    tokenizer = Tokenizer(tokenizer_path)
    defaults = read_defaults(tokenizer_path)
    card = ModelCard("tiny", str(tokenizer_path), 128, tokenizer.vocab_size, created=0, defaults=defaults)
    async with Session(CREDENTIALS, {"router-0": service.address}) as session:
        await until(session.ready)
        transport = httpx.ASGITransport(create_app(CONFIG, card, tokenizer, session))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            yield client
    exchange.close()
    await service.stop()
    workers.close()


async def complete(client: httpx.AsyncClient, traceparent: str) -> str:
    body = {"model": "tiny", "prompt": f"The {WORD} is", "max_tokens": 4, "ignore_eos": True, "temperature": 1}
    headers = {"traceparent": traceparent} if traceparent else {}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


@in_loop
async def test_one_trace_from_the_client_to_the_workers(spans: Ended, checkpoint: Path, byte_level_path: Path) -> None:
    async with client_of(checkpoint, byte_level_path) as client:
        request_id = await complete(client, f"00-{TRACE}-{CLIENT}-01")
    found = spans.take()
    by_id = {span.context.span_id: span for span in found}
    names = Counter(span.name for span in found)
    assert names["POST /v1/completions"] == names["queue"] == names["prefill"] == 1
    assert names["step"] == names["exchange"] == 4
    assert 4 <= names["worker compute"] <= 8
    assert {f"{span.context.trace_id:032x}" for span in found} == {TRACE}
    parents = {"queue": "POST", "prefill": "POST", "step": "POST", "exchange": "step", "worker compute": "exchange"}
    for span in found:
        assert span.end_time >= span.start_time > 0
        assert WORD not in span.to_json()
        if (parent := by_id.get(span.parent.span_id)) is None:
            assert span.name.startswith("POST") and f"{span.parent.span_id:016x}" == CLIENT
            assert span.attributes["expertmesh.request_id"] == request_id
            assert span.attributes["http.response.status_code"] == 200
        else:
            assert parent.name.startswith(parents[span.name])
        if span.name == "exchange":
            assert parent.start_time <= span.start_time and span.end_time <= parent.end_time
            assert span.attributes["expertmesh.slowest_layer"] in range(3)
            assert 0 < span.attributes["expertmesh.slowest_seconds"] <= span.attributes["expertmesh.seconds"]
        if span.name == "worker compute":
            assert span.start_time == parent.start_time < span.end_time
            assert span.attributes["expertmesh.worker"] in ("a", "b") and span.attributes["expertmesh.rows"] > 0


@in_loop
async def test_who_is_not_sampled_or_asked_for_leaves_no_span(
    spans: Ended, checkpoint: Path, byte_level_path: Path
) -> None:
    async with client_of(checkpoint, byte_level_path) as client:
        await complete(client, f"00-{TRACE}-{CLIENT}-00")
        assert spans.take() == ()
        spans.start()
        await complete(client, "")  # the client traces nothing; we do
        assert len({span.context.trace_id for span in spans.take()}) == 1
        spans.start()
        await complete(client, "nonsense")
        assert "step" in {span.name for span in spans.take()}
        await complete(client, f"00-{TRACE}-{CLIENT}-01")  # nothing is traced now
        assert tracing.deferred() is None and tracing.tracer() is None


REQUESTS = (f"00-{TRACE}-{CLIENT}-01", "", f"00-{TRACE}-{CLIENT}-01", f"00-{OTHER}-{CLIENT}-01")


def traced() -> list[Sequence]:
    return [Sequence("x", [1], SamplingParams(max_tokens=1, traceparent=each)) for each in REQUESTS]


def test_a_step_is_in_the_trace_of_the_first_and_linked_to_the_others(spans: Ended) -> None:
    made = RouterSpans()
    with made.step(7, 9, traced()):
        assert made.is_tracing
    assert not made.is_tracing
    with pytest.raises(KeyError), made.step(8, 9, traced()):
        raise KeyError(WORD)
    span, failed = spans.take()
    assert f"{span.context.trace_id:032x}" == TRACE and dict(span.attributes)["expertmesh.rows"] == 9
    assert [f"{link.context.trace_id:032x}" for link in span.links] == [OTHER]
    assert span.status.is_ok or span.status.is_unset
    assert failed.status.status_code.name == "ERROR" and WORD not in failed.to_json()


def test_a_captured_step_tells_what_its_workers_computed(spans: Ended) -> None:
    made = RouterSpans()
    with made.step(7, 9, traced()):
        made.captured(time.perf_counter(), 0.25, [("a", 0.5, 3), ("b", 0.125, 4)])
    step, exchange, *computing = spans.take()
    assert exchange.parent.span_id == step.context.span_id and exchange.attributes["expertmesh.seconds"] == 0.25
    assert step.start_time <= exchange.start_time <= exchange.end_time <= step.end_time
    assert {each.parent.span_id for each in computing} == {exchange.context.span_id}
    assert [each.end_time - each.start_time for each in computing] == [500_000_000, 125_000_000]
    assert [(each.attributes["expertmesh.worker"], each.attributes["expertmesh.rows"]) for each in computing] == [
        ("a", 3),
        ("b", 4),
    ]


def test_a_note_that_cannot_be_drawn_costs_the_others_nothing(spans: Ended, caplog: Any) -> None:
    made, deferred = RouterSpans(), tracing.deferred()
    assert deferred is not None
    deferred.add(Mock(draw=Mock(side_effect=ValueError)))
    with made.step(7, 9, traced()):
        pass
    assert [span.name for span in spans.take()] == ["step"] and "could not be made" in caplog.text


def test_opentelemetry_s_own_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    ended = Ended()
    with RouterSpans().step(7, 9, traced()):
        pass
    assert tracing.tracer() is None and ended.take() == ()


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.configure(None, "router-0", "")
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"pip install 'expertmesh\[tracing\]'"):
        tracing.configure("http://127.0.0.1:4318/v1/traces", "router-0", "")
