"""What a router adds to the traces of requests: waiting, prefill, steps, exchanges, and the workers' part of these.

A step is one for many requests: its span is in the trace of the first one that is traced, and has links to the others.
What expert workers computed is drawn by their replies' own account, before the moment at which the reply was there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.observe import tracing
from cluster.observe.tracing import context_of, since_epoch_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.router.exchange.sender import Part
    from cluster.router.sequence import Sequence


class RouterSpans:
    """The step loop's alone. Nothing is made for requests that are not traced."""

    def __init__(self) -> None:
        self._step: Any = None  # the context of the step under way; None: nobody in it is traced

    @property
    def is_tracing(self) -> bool:
        """Whether somebody in the step under way is traced."""
        return self._step is not None

    @contextmanager
    def step(self, number: int, n_rows: int, sequences: Iterable[Sequence]) -> Iterator[None]:
        """Around the computing of a step."""
        tracer = tracing.tracer()
        traced = [each for each in sequences if each.params.traceparent] if tracer is not None else []
        if tracer is None or not traced:
            yield
            return
        from opentelemetry import trace

        contexts = [context_of(each.params.traceparent) for each in traced]
        links = [trace.Link(trace.get_current_span(context).get_span_context()) for context in contexts[1:]]
        attributes = {"expertmesh.step": number, "expertmesh.rows": n_rows, "expertmesh.traced": len(traced)}
        with tracer.start_as_current_span(
            "step", contexts[0], links=links, attributes=attributes, record_exception=False
        ) as span:
            self._step = trace.set_span_in_context(span)
            try:
                yield
            finally:
                self._step = None

    def exchange(self, parts: Iterable[Part], began: float, now: float) -> None:
        """After one layer's exchange. Times by time.perf_counter()."""
        tracer = tracing.tracer()
        if self._step is None or tracer is None:
            return
        from opentelemetry import trace

        kept = [part for part in parts if part.reply.loss is None]
        layer = kept[0].rows.tag.layer if kept else -1
        ended = since_epoch_ns(now, now)
        started = ended - round(1e9 * (now - began))
        span = tracer.start_span("exchange", self._step, attributes={"expertmesh.layer": layer}, start_time=started)
        inside = trace.set_span_in_context(span)
        for part in kept:
            attributes: dict[str, str | int] = {
                "expertmesh.worker": part.reply.worker,
                "expertmesh.layer": layer,
                "expertmesh.rows": part.rows.n_pairs,
            }
            begin = max(started, ended - part.reply.compute_ns)
            computing = tracer.start_span("worker compute", inside, attributes=attributes, start_time=begin)
            computing.end(begin + part.reply.compute_ns)
        span.end(ended)

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
