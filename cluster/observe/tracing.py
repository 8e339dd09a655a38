"""Traces of requests, by OpenTelemetry, to a collector over OTLP. Off unless a collector is named.

OpenTelemetry is imported when it is asked for. Its own variables (OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...)
say how much is traced and how it is sent.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cluster.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, SpanContext, Tracer

    from cluster.observe.deferred_spans import DeferredSpans

Attributes = Mapping[str, str | int | float]

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_SCOPE = "expertmesh"
_tracer: Tracer | None = None
_deferred: DeferredSpans | None = None


def check_installed() -> None:
    """StartError, saying what to do, where OpenTelemetry is missing."""
    for name in _NEEDED:
        try:
            found = find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise StartError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'expertmesh[tracing]'")


def configure(endpoint: str | None, process: str, cluster: str) -> None:
    """Trace what this process does; `endpoint` is the collector's URL (http://HOST:4318/v1/traces). None: do not."""
    if endpoint is None:
        return
    check_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    install(BatchSpanProcessor(OTLPSpanExporter(endpoint)), process, cluster)


def install(processor: SpanProcessor | None, process: str, cluster: str = "") -> None:
    """Give every span that ends to `processor`; None: make none any more, once those that were noted are made."""
    global _tracer, _deferred
    if _deferred is not None:
        _deferred.close()
        atexit.unregister(_deferred.close)
    _tracer = _deferred = None
    if processor is None:
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Tracer as SdkTracer
    from opentelemetry.sdk.trace import TracerProvider

    from cluster.observe.deferred_spans import DeferredSpans, Pen

    named = {"service.name": "expertmesh", "service.instance.id": process, "service.namespace": cluster}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(processor)
    tracer = provider.get_tracer(_SCOPE)
    if isinstance(tracer, SdkTracer):  # else OTEL_SDK_DISABLED
        _tracer, _deferred = tracer, DeferredSpans(Pen(provider, _SCOPE, processor))
        atexit.register(_deferred.close)  # before the provider's own, which sends what is left


def tracer() -> Tracer | None:
    """What makes spans; None while nothing is traced."""
    return _tracer


def deferred() -> DeferredSpans | None:
    """What makes spans later, of what was noted; None while nothing is traced."""
    return _deferred


@contextmanager
def request_span(name: str, traceparent: str, attributes: Attributes) -> Iterator[Span | None]:
    """A span around an HTTP request, a child of the client's `traceparent` where that is one; None: not traced."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(
        name,
        context_of(traceparent),
        kind=SpanKind.SERVER,
        attributes=dict(attributes),
        record_exception=False,  # an error's text may quote what a client sent
        set_status_on_exception=False,
    ) as span:
        yield span


@lru_cache(maxsize=1024)  # of a step's requests it is asked again and again
def context_of(traceparent: str) -> Any:
    """The context that a W3C `traceparent` names, for what follows from it; an empty or broken one: none."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None


def span_context_of(traceparent: str) -> SpanContext:
    """The span that a W3C `traceparent` names."""
    from opentelemetry.trace import get_current_span

    return get_current_span(context_of(traceparent)).get_span_context()


def current_traceparent() -> str:
    """The W3C `traceparent` of the span that this task is in, if that is kept; else ""."""
    if _tracer is None:
        return ""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not trace.get_current_span().get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def since_epoch_ns(clock_s: float, now_s: float) -> int:
    """Nanoseconds since 1970 of `clock_s` on a clock that says `now_s` now."""
    return time.time_ns() - round(1e9 * (now_s - clock_s))
