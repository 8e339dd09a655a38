"""Which process computes on what, and how much of a GPU each gets: from options, GPUs and sizes. Pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.config import Config
from cluster.errors import StartError
from cluster.router.sizing import CPU_KV_MIB
from workers.device import CONTEXT_BYTES, Gpu

_CPU_WORKERS = 2
_OLDEST, _FIRST_WITH_8_BITS = (8, 0), (8, 9)  # compute capabilities
_SHARES = 10_000  # Ray counts GPUs in steps of 0.0001


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on a device, by what takes them."""

    experts: int  # those of all layers
    n_experts: int  # of a layer
    dense: int  # of a router
    work: int  # a router's step: activations, logits
    kv_block: int
    experts_8: int = 0  # those of all layers in 8 bits, where they may be kept so


@dataclass(frozen=True, slots=True)
class Use:
    """What one process will take of its GPU, in bytes."""

    role: str  # "router", "expert worker"
    count: int  # processes like it
    gpus: float  # its share: 0.25 is a quarter of one GPU
    budget: int  # what it may take
    weights: int
    work: int
    kv_cache: int

    def __str__(self) -> str:
        kv = f" + {_gib(self.kv_cache)} KV cache" if self.kv_cache else ""
        share = "a GPU" if self.gpus == 1 else f"{self.gpus:g} GPUs"
        return f"{self.count} x {self.role} on {share}: {_gib(self.weights)} weights{kv} of {_gib(self.budget)}"


def kinds(config: Config, gpus: Sequence[Gpu]) -> Config:
    """`config` with "cpu" or "cuda" for each role. Raises StartError when a GPU is asked for and there is none, or is
    to do what it cannot."""
    found: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    for name in ("router_device", "expert_device"):
        if getattr(config, name) == "cuda" and not gpus:
            raise StartError(f"{name} is cuda, but this machine shows no GPU (nvidia-smi lists them; torch needs CUDA)")
    config = replace(
        config,
        router_device=found if config.router_device == "auto" else config.router_device,
        expert_device=found if config.expert_device == "auto" else config.expert_device,
    )
    if "cuda" in (config.router_device, config.expert_device):
        _check_cards(config, [gpu for gpu in gpus if gpu.capability != (0, 0)])
    return config


def _check_cards(config: Config, gpus: Sequence[Gpu]) -> None:
    """Whether there are kernels for the GPUs."""
    for gpu in gpus:
        has = f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        if gpu.capability < _OLDEST:
            change = "hide it with CUDA_VISIBLE_DEVICES, or ask for --router-device cpu --expert-device cpu"
            raise StartError(f"{has}, and kernels need 8.0 (A100 and later): {change}")
        if config.expert_device == "cuda" and config.expert_dtype.startswith("fp8") and not has_8_bits(gpu):
            raise StartError(
                f"--expert-dtype {config.expert_dtype}: {has}, and products of 8 bits need 8.9 (L40S, H100)"
            )


def has_8_bits(gpu: Gpu) -> bool:
    """Whether its matrix units take 8 bits, as far as that is known."""
    return gpu.capability == (0, 0) or gpu.capability >= _FIRST_WITH_8_BITS


def arrange(config: Config, gpus: Sequence[Gpu], needs: Needs) -> tuple[Config, tuple[Use, ...]]:
    """`config`, whose devices are named, with the number of expert workers, everybody's share of a GPU and the size of
    the KV caches settled; and what will be taken of the GPUs.

    Raises StartError, naming the smallest change that helps, when weights or one KV cache do not fit.
    """
    on_gpu = [config.router_device == "cuda", config.expert_device == "cuda"]
    if not any(on_gpu):
        config = replace(config, expert_workers=_n_workers(config, len(gpus), needs))
        return replace(config, kv_cache_mb=config.kv_cache_mb or CPU_KV_MIB), ()
    gpu_bytes = min(_usable(gpu, config.gpu_memory_utilization) for gpu in gpus)
    n_workers = _n_workers(config, len(gpus), needs)
    if all(on_gpu) and n_workers and needs.experts / n_workers + CONTEXT_BYTES > gpu_bytes and _is_open(config):
        n_workers = max(n_workers, min(len(gpus), needs.n_experts))  # routers move in with them
    config = replace(config, expert_workers=n_workers)
    shard = math.ceil(needs.experts / n_workers) if n_workers else 0
    least_router = needs.dense + needs.work + CONTEXT_BYTES + (0 if n_workers else needs.experts)
    router_share, worker_share = _shares(config, len(gpus), n_workers, least_router, shard + CONTEXT_BYTES, gpu_bytes)
    uses = []
    if n_workers and on_gpu[1]:
        use = Use("expert worker", n_workers, worker_share, int(worker_share * gpu_bytes), shard, CONTEXT_BYTES, 0)
        _check_experts(use, needs, len(gpus) - (config.routers if on_gpu[0] else 0))
        uses.append(use)
    kv_bytes = (config.kv_cache_mb or CPU_KV_MIB) * 2**20
    if on_gpu[0]:
        budget = int(router_share * gpu_bytes)
        left = budget - least_router
        kv_bytes = config.kv_cache_mb * 2**20 or max(0, left)
        weights = least_router - needs.work - CONTEXT_BYTES
        use = Use("router", config.routers, router_share, budget, weights, needs.work + CONTEXT_BYTES, kv_bytes)
        _check_router(use, needs, left, len(gpus), n_workers)
        uses.append(use)
    settled = replace(
        config,
        kv_cache_mb=max(1, kv_bytes // 2**20),
        gpus_per_router=router_share if on_gpu[0] else 0.0,
        gpus_per_expert_worker=worker_share if n_workers and on_gpu[1] else 0.0,
    )
    _check_count(settled, len(gpus))
    return settled, tuple(uses)


def _n_workers(config: Config, n_gpus: int, needs: Needs) -> int:
    if config.expert_workers is not None:
        return config.expert_workers
    if config.transport == "local":
        return 0
    if config.expert_device == "cpu":
        return _CPU_WORKERS
    taken = config.routers if config.router_device == "cuda" else 0
    most = min(n_gpus - taken, needs.n_experts)
    # One GPU for everything is fastest in one process; several routers need their experts elsewhere.
    alone = config.router_device == "cuda" and config.routers == 1 and config.transport == "auto"
    return max(most, 0 if alone else 1)


def _is_open(config: Config) -> bool:
    """Whether nothing was said of how many expert workers there are, and who gets how much of a GPU."""
    return config.expert_workers is None and not config.gpus_per_router and not config.gpus_per_expert_worker


def _usable(gpu: Gpu, utilization: float) -> int:
    """What ours may take of a GPU: its share of the whole, less what others have taken."""
    return max(0, int(gpu.total_bytes * utilization) - (gpu.total_bytes - gpu.free_bytes))


def _shares(
    config: Config, n_gpus: int, n_workers: int, router_bytes: int, worker_bytes: int, gpu_bytes: int
) -> tuple[float, float]:
    """Each router's and each expert worker's part of a GPU: as configured, one each, or what their sizes ask for."""
    n_routers = config.routers if config.router_device == "cuda" else 0
    n_workers = n_workers if config.expert_device == "cuda" else 0
    router, worker = config.gpus_per_router, config.gpus_per_expert_worker
    processes = n_routers + n_workers
    if router and worker:
        return router, worker
    if processes <= n_gpus:
        even = 1.0
    elif (n_gpus == 1 or n_routers <= n_workers == n_gpus) and not router and not worker:
        # Weights get what they need and a tenth more, what is left is shared by the routers for their KV caches: of the
        # one GPU, or each router of another that has a worker too.
        beside = n_workers if n_gpus == 1 else 1
        worker = _floor(min(1 / max(1, beside), worker_bytes * 1.1 / max(1, gpu_bytes)))
        return _floor((1 - beside * worker) / max(1, n_routers if n_gpus == 1 else 1)), worker
    else:
        even = _floor(1 / math.ceil(processes / n_gpus))
    return router or even, worker or even


def _check_experts(use: Use, needs: Needs, n_free: int) -> None:
    """Whether a worker's part of the experts fits its part of a GPU."""
    room = use.budget - use.work
    if use.weights <= room:
        return
    wanted = math.ceil(needs.experts / max(1, int(use.budget / max(use.gpus, 1e-4)) - use.work))
    if wanted <= max(n_free, 0) and wanted != use.count:
        change = f"--expert-workers {wanted}"
    elif use.gpus < 1:
        change = "fewer processes on each GPU, larger --gpus-per-expert-worker, or more GPUs"
    else:
        change = f"{wanted} GPUs like these for the experts ({max(n_free, 0)} are free for them), or larger ones"
    if 0 < math.ceil(needs.experts_8 / use.count) <= room:
        change = f"--expert-dtype fp8, which halves them; or {change}"
    raise StartError(
        f"the experts do not fit: each of {use.count} expert workers holds {_gib(use.weights)} of weights and has room "
        f"for {_gib(max(0, room))}; the smallest change: {change}"
    )


def _check_router(use: Use, needs: Needs, left: int, n_gpus: int, n_workers: int) -> None:
    """Whether a router's weights fit, and its KV cache of at least one block."""
    if left >= max(use.kv_cache, needs.kv_block):
        return
    if left < needs.kv_block:
        change = (
            f"--expert-workers {max(1, n_gpus - use.count)}, which takes the experts to GPUs of their own"
            if not n_workers and n_gpus > use.count
            else "a larger --gpu-memory-utilization, or a GPU with more memory"
        )
        if not n_workers and needs.experts_8 and left + needs.experts - needs.experts_8 >= needs.kv_block:
            change = f"--expert-dtype fp8, which halves the experts; or {change}"
        what = f"{_gib(use.weights)} of weights leave no room for a KV cache in {_gib(use.budget)}"
    else:
        change = f"--kv-cache-mb {left // 2**20}"
        weights = f"{_gib(use.weights)} of weights in {_gib(use.budget)}"
        what = f"a KV cache of {_gib(use.kv_cache)} does not fit beside {weights}"
    raise StartError(f"a router does not fit its GPU: {what}; the smallest change: {change}")


def _check_count(config: Config, n_gpus: int) -> None:
    wanted = config.routers * config.gpus_per_router + int(config.expert_workers or 0) * config.gpus_per_expert_worker
    if wanted > n_gpus + 1e-6:
        raise StartError(
            f"{config.routers} routers with {config.gpus_per_router:g} GPUs each and {config.expert_workers} expert "
            f"workers with {config.gpus_per_expert_worker:g} need {wanted:g} GPUs, {n_gpus} are here: ask for "
            f"fewer, or smaller shares"
        )


def _floor(share: float) -> float:
    return math.floor(share * _SHARES) / _SHARES


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
