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
from typing import TYPE_CHECKING, NamedTuple

from cluster.observe import tracing
from cluster.observe.tracing import Attributes, context_of, since_epoch_ns, span_context_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.observe.deferred_spans import Pen
    from cluster.router.exchange.sender import Part
    from cluster.router.sequence import Sequence


class _Work(NamedTuple):
    """What a worker computed."""

    worker: str
    compute_ns: int
    rows: int


class _Exchange(NamedTuple):
    """One layer's, or that of all layers of a captured step. Times by time.perf_counter()."""

    layer: int | None
    began: float
    ended: float
    seconds: float
    work: list[_Work]


class _Step(NamedTuple):
    """A step that is over. Its start by time.time_ns() and by time.perf_counter(), by which it and exchanges end."""

    attributes: Attributes
    traceparents: tuple[str, ...]
    start_ns: int
    began: float
    ended: float
    has_failed: bool
    exchanges: list[_Exchange]

    def draw(self, pen: Pen) -> None:
        """One span for the step, one for its exchanges, and one for each worker in them: a span for each layer would
        cost more than the exchange, and nobody could read them."""
        contexts = [each for each in map(span_context_of, self.traceparents) if each.is_valid]
        if not contexts:
            return
        end_ns, links = self._ns(self.ended), contexts[1:]
        step = pen.span(
            "step", contexts[0], self.start_ns, end_ns, self.attributes, links=links, has_failed=self.has_failed
        )
        if not self.exchanges:
            return
        start_ns = self._ns(self.exchanges[0].began)
        attributes: dict[str, str | int | float] = {"expertmesh.seconds": sum(each.seconds for each in self.exchanges)}
        slowest = max(self.exchanges, key=lambda each: each.seconds)
        if slowest.layer is not None:
            attributes["expertmesh.slowest_seconds"] = slowest.seconds
            attributes["expertmesh.slowest_layer"] = slowest.layer
        inside = pen.span("exchange", step, start_ns, self._ns(self.exchanges[-1].ended), attributes)
        spent: Counter[str] = Counter()  # nanoseconds, by worker
        rows: Counter[str] = Counter()
        for each in self.exchanges:
            for worker, compute_ns, n_rows in each.work:
                spent[worker] += compute_ns
                rows[worker] += n_rows
        for worker, compute_ns in spent.items():
            attributes = {"expertmesh.worker": worker, "expertmesh.rows": rows[worker]}
            pen.span("worker compute", inside, start_ns, start_ns + compute_ns, attributes)

    def _ns(self, at: float) -> int:
        """Nanoseconds since 1970 of a time by time.perf_counter()."""
        return self.start_ns + round(1e9 * (at - self.began))


class RouterSpans:
    """The step loop's alone. Nothing is noted of requests that are not traced."""

    def __init__(self) -> None:
        self.is_tracing = False  # whether somebody in the step under way is traced
        self._exchanges: list[_Exchange] = []  # of that step

    @contextmanager
    def step(self, number: int, n_rows: int, sequences: Iterable[Sequence]) -> Iterator[None]:
        """Around the computing of a step. Its spans are made later, in another thread: see `DeferredSpans`."""
        deferred = tracing.deferred()
        traced = [parent for each in sequences if (parent := each.params.traceparent)] if deferred is not None else []
        if deferred is None or not traced:
            yield
            return
        start_ns, began, has_failed = time.time_ns(), time.perf_counter(), True
        self.is_tracing = True
        try:
            yield
            has_failed = False
        finally:
            self.is_tracing = False
            exchanges, self._exchanges = self._exchanges, []
            attributes = {"expertmesh.step": number, "expertmesh.rows": n_rows, "expertmesh.traced": len(traced)}
            parents = tuple(dict.fromkeys(traced))
            deferred.add(_Step(attributes, parents, start_ns, began, time.perf_counter(), has_failed, exchanges))

    def exchange(self, parts: Items[Part], began: float, now: float) -> None:
        """After one layer's exchange. Times by time.perf_counter()."""
        work = [_Work(part.reply.worker, part.reply.compute_ns, part.rows.n_pairs) for part in parts]
        self._exchanges.append(_Exchange(parts[0].rows.tag.layer, began, now, now - began, work))

    def captured(self, began: float, waited_s: float, work: Iterable[tuple[str, float, int]]) -> None:
        """After a captured step, all of whose exchanges are one: how long it waited for them, and of each worker its
        name, the seconds it computed, its rows. `began` by time.perf_counter()."""
        done = [_Work(worker, round(1e9 * seconds), rows) for worker, seconds, rows in work]
        self._exchanges.append(_Exchange(None, began, time.perf_counter(), waited_s, done))

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
