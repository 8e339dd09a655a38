"""What Prometheus is told of the processes: their endpoints, as its file and HTTP discovery have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Target(NamedTuple):
    """The endpoint of one process."""

    process: str  # `router-0`
    role: str
    url: str


def target_groups(targets: Iterable[Target], cluster: str) -> list[dict[str, Any]]:
    """One group for each process, with the labels that its series have beside their own; `cluster` is its name."""
    return [
        {
            "targets": [urlsplit(target.url).netloc],
            "labels": {
                "__metrics_path__": urlsplit(target.url).path,
                "cluster": cluster,
                "role": target.role,
                "instance": target.process,
            },
        }
        for target in sorted(targets)
    ]
