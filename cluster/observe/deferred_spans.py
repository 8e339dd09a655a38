"""Spans that are made after what they tell of, in a thread of their own: a step loop notes numbers, and goes on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Protocol

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_MOST_NOTES = 4096  # the oldest go first when nobody draws them: a trace with gaps is better than a full memory


class Note(Protocol):
    """What happened, in plain numbers."""

    def draw(self, pen: Pen) -> None:
        """Make the spans."""


class Pen:
    """Makes spans of the past: an OpenTelemetry tracer makes those of the present, at six times the cost.

    Each has a parent that was sampled, and so is itself, as OpenTelemetry's parent-based samplers have it.
    """

    def __init__(self, provider: TracerProvider, scope: str, processor: SpanProcessor) -> None:
        self._resource = provider.resource
        self._new_id = provider.id_generator.generate_span_id
        self._scope = InstrumentationScope(scope, "")
        self._processor = processor

    def span(
        self,
        name: str,
        parent: SpanContext,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, str | int | float],
        *,
        links: Items[SpanContext] = (),
        has_failed: bool = False,
    ) -> SpanContext:
        """Times are nanoseconds since 1970. Returns what its children call their parent."""
        context = SpanContext(parent.trace_id, self._new_id(), is_remote=False, trace_flags=parent.trace_flags)
        self._processor.on_end(
            ReadableSpan(
                name, context, parent, self._resource, attributes, links=[Link(each) for each in links],
                status=Status(StatusCode.ERROR) if has_failed else _UNSET, start_time=start_ns, end_time=end_ns,
                instrumentation_scope=self._scope,
            )
        )  # fmt: skip
        return context


_UNSET = Status()


class DeferredSpans:
    """Draws what was noted once a second, until it is closed."""

    def __init__(self, pen: Pen) -> None:
        self._pen = pen
        self._notes: deque[Note] = deque(maxlen=_MOST_NOTES)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def add(self, note: Note) -> None:
        """From any thread; costs an append."""
        self._notes.append(note)

    def close(self) -> None:
        """Draw what is left."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self._draw()
        self._draw()

    def _draw(self) -> None:
        while self._notes:
            try:
                self._notes.popleft().draw(self._pen)
            except Exception:  # a trace is worth less than the thread that draws the next one
                log.exception("a span could not be made")
