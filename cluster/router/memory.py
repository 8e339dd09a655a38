"""Whether what is to be loaded fits, asked before it is loaded: the alternative is to be killed without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from cluster.config import Config
from cluster.errors import StartError
from workers.host_memory import available_bytes

_CPU = torch.device("cpu")


def check_memory(wanted: Mapping[str, int], device: torch.device = _CPU) -> None:
    """Raise StartError unless the bytes in `wanted`, by what they are for, fit in what `device` has available."""
    total = sum(wanted.values())
    available = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if total > available:
        parts = ", ".join(f"{name} {_mib(n)}" for name, n in wanted.items())
        where = "" if device.type == "cpu" else f" on {device}"
        raise StartError(f"not enough memory{where}: {_mib(total)} needed ({parts}), {_mib(available)} available")


def with_kv_cache(config: Config, device: torch.device, others: Mapping[str, int]) -> Config:
    """`config` with the size of a KV cache: where it is left open, what `others` leave of the GPU's share."""
    if config.kv_cache_mb or device.type == "cpu":
        return config
    free, total = torch.cuda.mem_get_info(device)
    left = int(total * config.gpu_memory_utilization) - (total - free) - sum(others.values())
    return replace(config, kv_cache_mb=max(1, left // 2**20))


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
