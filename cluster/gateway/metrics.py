"""The gateway's own Prometheus series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One gateway's series in a registry of their own, so that several gateways can live in one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "expertmesh_gateway_requests",
            "HTTP requests by route and status; 499: the client left",
            ["route", "status"],
            registry=registry,
        )
        self.open_sequences = Gauge(
            "expertmesh_gateway_open_sequences", "Sequences being generated or waiting for it", registry=registry
        )
        self.prompt_tokens = Counter(
            "expertmesh_gateway_prompt_tokens", "Prompt tokens of the sequences started", registry=registry
        )
        self.tokens = Counter("expertmesh_gateway_tokens", "Tokens generated for clients", registry=registry)
        self.first_token = Histogram(
            "expertmesh_gateway_first_token_seconds",
            "From the start of a sequence to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.next_token = Histogram(
            "expertmesh_gateway_next_token_seconds",
            "Between two outputs of a sequence after its first",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """All series in the exposition format."""
        return generate_latest(self._registry)
