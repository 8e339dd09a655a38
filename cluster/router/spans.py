"""What a router adds to the traces of requests: waiting, prefill, steps, exchanges, and the workers' part of these.

A step is one for many requests: its span is in the trace of the first one that is traced, and has links to the others.
What expert workers computed is drawn by their replies' own account: a span as long as all calls of the step together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.observe import tracing
from cluster.observe.tracing import context_of, since_epoch_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Tracer

    from cluster.router.exchange.sender import Part
    from cluster.router.sequence import Sequence


class _Exchange(NamedTuple):
    """One layer's. Times by time.perf_counter(); of each worker its name, the nanoseconds it computed, its rows."""

    layer: int
    began: float
    ended: float
    parts: list[tuple[str, int, int]]


class RouterSpans:
    """The step loop's alone. Nothing is made for requests that are not traced."""

    def __init__(self) -> None:
        self.is_tracing = False  # whether somebody in the step under way is traced
        self._exchanges: list[_Exchange] = []  # of that step

    @contextmanager
    def step(self, number: int, n_rows: int, sequences: Iterable[Sequence]) -> Iterator[None]:
        """Around the computing of a step."""
        tracer = tracing.tracer()
        traced = [each for each in sequences if each.params.traceparent] if tracer is not None else []
        if tracer is None or not traced:
            yield
            return
        from opentelemetry import trace

        contexts = [
            context_of(traceparent) for traceparent in dict.fromkeys(each.params.traceparent for each in traced)
        ]
        links = [trace.Link(trace.get_current_span(context).get_span_context()) for context in contexts[1:]]
        attributes = {"expertmesh.step": number, "expertmesh.rows": n_rows, "expertmesh.traced": len(traced)}
        with tracer.start_as_current_span(
            "step", contexts[0], links=links, attributes=attributes, record_exception=False
        ) as span:
            self.is_tracing = True
            try:
                yield
            finally:
                self.is_tracing = False
                self._draw_exchanges(tracer, trace.set_span_in_context(span))

    def exchange(self, parts: Items[Part], began: float, now: float) -> None:
        """After one layer's exchange. Times by time.perf_counter()."""
        did = [(part.reply.worker, part.reply.compute_ns, part.rows.n_pairs) for part in parts]
        self._exchanges.append(_Exchange(parts[0].rows.tag.layer, began, now, did))

    def _draw_exchanges(self, tracer: Tracer, context: Any) -> None:
        """One span for those of a step, and one for each worker in them: a span for each layer would cost more than
        the exchange, and nobody could read them."""
        from opentelemetry import trace

        exchanges, self._exchanges = self._exchanges, []
        if not exchanges:
            return
        clock = time.perf_counter()
        start, end = (since_epoch_ns(at, clock) for at in (exchanges[0].began, exchanges[-1].ended))
        seconds = [each.ended - each.began for each in exchanges]
        attributes: dict[str, str | int | float] = {
            "expertmesh.seconds": sum(seconds),
            "expertmesh.slowest_seconds": (slowest := max(seconds)),
            "expertmesh.slowest_layer": exchanges[seconds.index(slowest)].layer,
        }
        span = tracer.start_span("exchange", context, attributes=attributes, start_time=start)
        inside = trace.set_span_in_context(span)
        spent: Counter[str] = Counter()  # nanoseconds, by worker
        rows: Counter[str] = Counter()
        for each in exchanges:
            for worker, compute_ns, n_rows in each.parts:
                spent[worker] += compute_ns
                rows[worker] += n_rows
        for worker, compute_ns in spent.items():
            attributes = {"expertmesh.worker": worker, "expertmesh.rows": rows[worker]}
            computing = tracer.start_span("worker compute", inside, attributes=attributes, start_time=start)
            computing.end(start + compute_ns)
        span.end(end)

    def first_token(self, sequence: Sequence, now: float) -> None:
        """`sequence` got its first token here. Times by time.monotonic()."""
        tracer = tracing.tracer()
        if tracer is None or not sequence.params.traceparent:
            return
        context, clock = context_of(sequence.params.traceparent), time.monotonic()
        arrived, admitted, first = (since_epoch_ns(at, clock) for at in (sequence.arrived, sequence.admitted_at, now))
        tracer.start_span("queue", context, start_time=arrived).end(admitted)
        attributes = {"expertmesh.prompt_tokens": sequence.n_prompt, "expertmesh.cached_tokens": sequence.cached}
        tracer.start_span("prefill", context, attributes=attributes, start_time=admitted).end(first)
