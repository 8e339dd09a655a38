"""The metrics endpoint of one of the cluster's processes, as the configuration wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from cluster.config import Config
from cluster.fleet.actor import node_address
from cluster.observe.endpoint import serve
from cluster.observe.exposition import Aliases, Readings, Source
from cluster.observe.process import ProcessReadings


def aliases_of(config: Config, process: str) -> Aliases | None:
    """vLLM's names, where they are wanted."""
    return Aliases.of(config.served_model_name or config.model, process) if config.vllm_metrics else None


def serve_metrics(
    config: Config,
    process: str,
    role: str,
    source: Source,
    *,
    epoch: Callable[[], int],
    state: Callable[[], str],
    device: Callable[[], Mapping[str, object]] | None = None,
) -> str | None:
    """Start the endpoint of `process`; its URL, None where there can be none. `source` gives what the process counts;
    `device` is what it says of its GPU."""
    sources: Iterable[Source] = (source, ProcessReadings(role, epoch, device))
    return serve(Readings(process, sources, aliases_of(config, process)), node_address(), config.metrics_port, state)
