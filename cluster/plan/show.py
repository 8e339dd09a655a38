"""A plan as people read it, as JSON, and as values for the chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.plan.known_models import HUB_IDS
from cluster.plan.ours import Layout, Load
from cluster.plan.tensor_parallel import TensorParallel, best_on


def as_json(layout: Layout, load: Load) -> dict[str, Any]:
    """Every figure of the plan, under names with their units."""
    size = layout.size
    rival = best_on(size, layout.gpu, layout.n_gpus, load, layout.utilization)
    return {
        "parameters": size.parameters,
        "active_parameters": size.active_parameters,
        "expert_bytes": size.expert_bytes,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "gpu": layout.gpu.name,
        "routers": layout.n_routers,
        "expert_workers": layout.n_workers,
        "router_bytes": layout.router_bytes,
        "expert_worker_bytes": layout.worker_bytes,
        "kv_cache_bytes_per_router": layout.kv_bytes,
        "kv_tokens": layout.kv_tokens,
        "largest_batch": layout.largest_batch(load.context),
        "traffic_bytes_per_layer": layout.traffic(load.sequences),
        "exchange_s_per_layer": layout.exchange_s(load.sequences),
        "step_s": layout.step_s(load),
        "tokens_per_s": layout.tokens_per_s(load),
        "tensor_parallel": None
        if rival is None
        else {"degree": rival.degree, "replicas": rival.replicas, "tokens_per_s": rival.tokens_per_s(load)},
    }


def show(layout: Layout, load: Load, console: Console) -> None:
    """The table, and the sentence on tensor parallelism."""
    size, gpu = layout.size, layout.gpu
    table = Table(box=None, show_header=False, pad_edge=False)

    def row(name: str, value: str) -> None:
        table.add_row(name, value)

    row("model", f"{size.parameters / 1e9:.1f} B parameters, {size.active_parameters / 1e9:.1f} B active")
    row("an expert of a layer", f"{size.expert_bytes / 1e6:,.0f} MB" if size.n_sparse else "none: a dense model")
    row("a token in the KV cache", f"{size.kv_bytes_per_token / 2**10:,.0f} KiB")
    row("", "")
    row("layout", f"{_count(layout)}, a {gpu.name} each")
    row("expert worker", f"{_gib(layout.worker_bytes)} of {_gib(layout.budget)}" if layout.n_workers else "none")
    row("router", f"{_gib(layout.router_bytes)} + {_gib(layout.kv_bytes)} KV cache of {_gib(layout.budget)}")
    row("KV room", f"{layout.kv_tokens:,} tokens in all routers")
    row("largest batch", f"{layout.largest_batch(load.context):,} sequences of {load.context:,} tokens")
    if layout.n_workers:
        kib, way = layout.traffic(load.sequences) / 2**10, "device memory" if layout.one_host else "network"
        row("traffic", f"{kib:,.0f} KiB a layer and router, {layout.exchange_s(load.sequences) * 1e6:,.0f} us ({way})")
    row("a step", f"{layout.step_s(load) * 1e3:.1f} ms for {load.sequences} sequences")
    row("expected", f"{layout.tokens_per_s(load):,.0f} tokens/s")
    console.print(table)
    console.print(comparison(layout, load), highlight=False)


def comparison(layout: Layout, load: Load) -> str:
    """One sentence: what the same GPUs would give under tensor parallelism, and what speaks for either."""
    if layout.n_gpus == 1:
        return "Tensor parallelism: nothing to divide, one GPU holds everything."
    rival = best_on(layout.size, layout.gpu, layout.n_gpus, load, layout.utilization)
    if rival is None:
        return f"Tensor parallelism: {layout.n_gpus} x {layout.gpu.name} have no room for the model and this load."
    theirs, ours = rival.tokens_per_s(load), layout.tokens_per_s(load)
    return f"Tensor parallelism on the same GPUs ({_cut(rival)}): {theirs:,.0f} tokens/s. {_verdict(ours, theirs)}"


def _cut(rival: TensorParallel) -> str:
    return f"{rival.replicas} x {rival.degree}" if rival.replicas > 1 else f"over {rival.degree}"


def _verdict(ours: float, theirs: float) -> str:
    if ours >= theirs:
        return f"Experts of their own give {ours / theirs:.2f} x that."
    return (
        f"That is {theirs / ours:.2f} x as much: take experts of their own for what else they give "
        "(pools that scale apart, experts that move, a lost worker without a lost request), not for this number."
    )


def chart_values(layout: Layout, load: Load, model: str) -> str:
    """A values file for helm/expertmesh. Of a model on this machine it is open on which claim it lies."""

    def resources(n_processes: int) -> dict[str, Any]:
        """As much for each process as the chart gives a pod of one."""
        memory = {"requests": f"{16 * n_processes}Gi", "limits": f"{32 * n_processes}Gi"}
        return {
            "requests": {"cpu": str(4 * n_processes), "memory": memory["requests"]},
            "limits": {"memory": memory["limits"]},
        }

    config: dict[str, Any] = {"max_sequences": -(-load.sequences // layout.n_routers)}
    if layout.size.expert_format.scaled:
        config["expert_dtype"] = layout.size.expert_format.name
    if layout.one_host:  # one pod, in which rows go through device memory
        routers = {"replicas": 1, "routersPerPod": layout.n_routers, "expertWorkersPerPod": layout.n_workers}
        pools = {"routers": {**routers, "resources": resources(layout.n_gpus)}, "experts": {"replicas": 0}}
    else:
        pools = {
            "routers": {"replicas": layout.n_routers, "resources": resources(1)},
            "experts": {"replicas": layout.n_workers, "resources": resources(1)},
        }
    gpu = {} if layout.gpu.resource == "nvidia.com/gpu" else {"gpu": {"resource": layout.gpu.resource}}
    values = {"model": _chart_model(layout, model), "image": {"variant": "cuda"}, **gpu, **pools, "config": config}
    note = (
        f"# expertmesh plan: {layout.n_gpus} x {layout.gpu.name}, {layout.tokens_per_s(load):,.0f} tokens/s expected\n"
    )
    return note + yaml.safe_dump(values, sort_keys=False)


def _chart_model(layout: Layout, model: str) -> dict[str, Any]:
    path = Path(model).expanduser()
    if path.exists():
        path = path.resolve()
        name = path.name if path.is_dir() else path.parent.name
        return {"id": name, "source": "pvc", "path": name, "storage": {"type": "pvc", "existingClaim": "models"}}
    room = -(-2 * layout.size.parameters * 5 // 4 // (10 * 2**30)) * 10  # of 16-bit weights, and a quarter more
    return {"id": HUB_IDS.get(model.lower(), model), "storage": {"size": f"{room}Gi"}}


def _count(layout: Layout) -> str:
    if not layout.n_workers:
        return "1 router that holds the experts"
    routers = "1 router" if layout.n_routers == 1 else f"{layout.n_routers} routers"
    return f"{routers} + {layout.n_workers} expert worker{'s' if layout.n_workers > 1 else ''}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
