"""From what a process counts to the text that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from cluster.observe.distribution import Distribution
from cluster.observe.series.base import OWN_LABEL, Series


class Reading(NamedTuple):
    """A series' value at the moment of a scrape, for one combination of its labels (those in its line of the table)."""

    series: Series
    value: float | Distribution
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Reading]]


@dataclass(frozen=True, slots=True)
class Aliases:
    """vLLM's names beside ours: `engine` is the number of the process."""

    model: str
    engine: str

    @classmethod
    def of(cls, model: str, process: str) -> Aliases:
        """For the process of a name like `router-1`."""
        return cls(model, process.rpartition("-")[2])


class Readings(Collector):
    """The series of one process, read when they are scraped. `sources` are called in the thread that serves the scrape.

    `aliases`: add vLLM's names where it has the same series.
    """

    def __init__(self, process: str, sources: Iterable[Source], aliases: Aliases | None = None) -> None:
        self.process = process
        self._sources = tuple(sources)
        self._aliases = aliases

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for source in self._sources:
            for reading in source():
                self._add(families, reading)
        return families.values()

    def _add(self, families: dict[str, Metric], reading: Reading) -> None:
        series, value, labels = reading
        own = () if OWN_LABEL[series.set_by] is None else (self.process,)
        _put(families, series.name, series, series.all_labels, (*own, *labels), value)
        if self._aliases is not None and series.vllm:
            names = ("model_name", "engine", *_as_vllm(series.labels))
            values = (self._aliases.model, self._aliases.engine, *labels)
            _put(families, series.vllm, series, names, values, value)


def _as_vllm(labels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("finished_reason" if label == "reason" else label for label in labels)


def _put(
    families: dict[str, Metric],
    name: str,
    series: Series,
    labels: tuple[str, ...],
    values: tuple[str, ...],
    value: float | Distribution,
) -> None:
    family = families.get(name)
    if family is None:
        family = families[name] = _MADE[series.kind](name.removesuffix("_total"), series.help, labels=labels)
    if isinstance(value, Distribution):
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(values, value.cumulative(), value.total)
    else:
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(values, value)


_MADE = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


def registry_of(collector: Collector) -> CollectorRegistry:
    """A registry of the collector alone, without what prometheus_client adds of itself."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def text_of(collector: Collector) -> bytes:
    """The exposition format."""
    return generate_latest(registry_of(collector))


def merged(texts: Iterable[str]) -> str:
    """Scrapes of several processes as one: each family once, with the samples of all. Nothing is parsed but the lines
    that begin a family."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for block in text.split("# HELP ")[1:]:
            head, _, rest = block.partition("\n")
            kind, _, samples = rest.partition("\n")
            families.setdefault(f"# HELP {head}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())
