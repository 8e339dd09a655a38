"""Whether what is to be loaded fits, asked before it is loaded: the alternative is to be killed without a word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster.errors import StartError

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory this process can still take: what the machine has, or what the container's limit leaves if that is less.

    Both count the page cache as available.
    """
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return available
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:  # no container, or none of version 2
        return available
    reclaimable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return max(0, min(available, int(limit) - used + reclaimable))


def check_memory(wanted: Mapping[str, int]) -> None:
    """Raise StartError unless the bytes in `wanted`, by what they are for, fit in what is available."""
    total, available = sum(wanted.values()), available_bytes()
    if total > available:
        parts = ", ".join(f"{name} {_mib(n)}" for name, n in wanted.items())
        raise StartError(f"not enough memory: {_mib(total)} needed ({parts}), {_mib(available)} available")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
