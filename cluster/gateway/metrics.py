"""The gateway's own Prometheus series; and those of all gateways as one scrape.

The port that clients use leads to any of the gateways, so what it answers has to be the same whichever it is: every
series carries the label `gateway`, and whoever is asked asks the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_PEER_TIMEOUT_S = 2.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One gateway's series in a registry of their own, so that several gateways can live in one process.

    `gateway` is its name in the label of every series; `peers` are the URLs of the other gateways' own series by name.
    """

    def __init__(self, gateway: str = "gateway-0") -> None:
        self.gateway = gateway
        self.peers: Mapping[str, str] = {}
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
        """This gateway's series in the exposition format."""
        return generate_latest(_Fixed(self._labelled()))

    async def of_all(self) -> bytes:
        """The series of all gateways in the exposition format; `expertmesh_gateway_up` says who did not answer."""
        async with httpx.AsyncClient(timeout=_PEER_TIMEOUT_S) as client:
            texts = await asyncio.gather(*(_fetch(client, url) for url in self.peers.values()))
        up = GaugeMetricFamily(
            "expertmesh_gateway_up", "Whether the gateway's series are part of this scrape", labels=["gateway"]
        )
        up.add_metric([self.gateway], 1)
        families = [up, *self._labelled()]
        for name, text in zip(self.peers, texts, strict=True):
            up.add_metric([name], 0 if text is None else 1)
            families += text_string_to_metric_families(text or "")
        return generate_latest(_Fixed(_merged(families)))

    def _labelled(self) -> list[Metric]:
        families = list(self._registry.collect())
        for family in families:
            family.samples = [
                sample._replace(labels={"gateway": self.gateway, **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")  # would come back from a peer as families of their own
            ]
        return families


class _Fixed(CollectorRegistry):
    """A registry of families that were collected before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self.register(_Collected(families))


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _merged(families: Iterable[Metric]) -> list[Metric]:
    """One family for each name, as the format asks for."""
    merged: dict[str, Metric] = {}
    for family in families:
        first = merged.setdefault(family.name, family)
        if first is not family:
            first.samples = [*first.samples, *family.samples]
    return list(merged.values())


async def _fetch(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        return (await client.get(url)).raise_for_status().text
    except httpx.HTTPError:
        return None
