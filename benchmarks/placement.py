"""`python -m benchmarks.placement`: what the planner reaches, beside the lower bound and equal shares, and how fast.

Loads are Zipf's, then every one changed by a random factor; and those of the default model, recorded by `expertmesh
analyze benchmarks/texts/*`: planned for code and English, then French and mathematics come.

Equal shares: replicas go one by one to the expert with the most rows for each, are packed largest first, and get the
same rows each, as planners without shares do. Legend: L layers, E experts of a layer, S slots of a layer, W workers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import run
from cluster.bench.common import machine, print_json, print_table
from cluster.placement.layout import Floats, Layout, replicate_and_pack
from cluster.placement.placement import striped
from cluster.placement.planner import Worker, balance
from cluster.placement.shares import equally
from cluster.routing.trace import read_trace

_SHAPES = ((32, 8, 4, 12), (32, 8, 8, 16), (58, 256, 32, 288), (58, 256, 144, 288))
_EXPONENTS = (0.5, 1.0, 1.5)
_DEFAULT_MODEL = Path(__file__).with_name("default_model.trace.jsonl")
_DRIFT = 0.25  # standard deviation of the logarithm of each expert's load after a while


def placement(
    seed: Annotated[int, typer.Option(help="of loads and drift")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Imbalance (sum over layers of max load by sum of mean load) and moved replicas, Zipf loads, then drifted ones."""
    rows = [_zipf(shape, exponent, seed) for shape in _SHAPES for exponent in _EXPONENTS]
    rows += [_recorded(n_workers, n_slots) for n_workers, n_slots in ((2, 12), (4, 12), (8, 16))]
    if as_json:
        print_json({"machine": machine(), "seed": seed, "drift": _DRIFT, "cases": rows})
        return
    header = (
        "L, E, W, S; loads",
        "bound",
        "equal shares",
        "planner",
        "s",
        "drifted: equal",
        "planner",
        "moves",
        "fresh",
    )
    print_table(
        "imbalance", header,
        [
            (
                f"{row['shape']}; {row['loads']}", f"{row['bound']:.4f}", f"{row['equal']:.4f}",
                f"{row['planner']:.4f}", f"{row['seconds']:.2f}", f"{row['drifted_equal']:.4f}",
                f"{row['drifted_planner']:.4f}", str(row["moves"]), str(row["fresh_moves"]),
            )
            for row in rows
        ],
    )  # fmt: skip


def zipf(n_layers: int, n_experts: int, exponent: float, rng: np.random.Generator) -> Floats:
    """Rows of each expert, [L, E]: another order in each layer."""
    weights = np.arange(1.0, n_experts + 1) ** -exponent
    loads_LE: Floats = np.stack([rng.permutation(weights) for _ in range(n_layers)])
    noisy_LE: Floats = 1e5 * loads_LE * np.exp(rng.normal(0, 0.05, loads_LE.shape))
    return noisy_LE


def lower_bound(loads_LE: Floats, n_workers: int, n_slots: int) -> Floats:
    """No worker of a layer can take less: the mean, and so long that the slots suffice to cut what is larger; [L]."""
    bound_L: Floats = loads_LE.sum(1) / n_workers
    spare = n_slots - loads_LE.shape[1]
    for layer, load_E in enumerate(loads_LE):
        while (np.ceil(load_E / bound_L[layer] - 1e-9) - 1).clip(0).sum() > spare:
            bound_L[layer] *= 1.0005
    return bound_L


def _zipf(shape: tuple[int, int, int, int], exponent: float, seed: int) -> dict[str, Any]:
    n_layers, n_experts, n_workers, n_slots = shape
    rng = np.random.default_rng(seed)
    loads_LE = zipf(n_layers, n_experts, exponent, rng)
    drifted_LE: Floats = loads_LE * np.exp(rng.normal(0, _DRIFT, loads_LE.shape))
    return _measure(f"Zipf {exponent}", loads_LE, drifted_LE, n_workers, n_slots)


def _recorded(n_workers: int, n_slots: int) -> dict[str, Any]:
    """As many tokens of each domain."""
    share = {
        window.name: window.counts.chosen_LE / window.counts.tokens for window in read_trace(_DEFAULT_MODEL).windows
    }
    first, then = share["code"] + share["english"], share["french"] + share["mathematics"]
    return _measure("default model", 1e5 * first, 1e5 * then, n_workers, n_slots)


def _measure(name: str, loads_LE: Floats, drifted_LE: Floats, n_workers: int, n_slots: int) -> dict[str, Any]:
    n_layers, n_experts = loads_LE.shape
    workers = [Worker(f"expert-{w:03d}", n_slots // n_workers * n_layers) for w in range(n_workers)]
    began = time.perf_counter()
    first = balance(loads_LE, workers, striped(n_layers, n_experts, [worker.name for worker in workers]))
    seconds = time.perf_counter() - began
    second = balance(drifted_LE, workers, first.placement)
    fresh = [_equal(loads, n_workers, n_slots) for loads in (loads_LE, drifted_LE)]
    mean = loads_LE.sum() / n_workers
    return {
        "shape": f"{n_layers}, {n_experts}, {n_workers}, {n_slots}", "loads": name,
        "bound": float(lower_bound(loads_LE, n_workers, n_slots).sum() / mean),
        "equal": _imbalance(fresh[0], n_workers), "planner": first.forecast.imbalance_after, "seconds": seconds,
        "drifted_equal": _imbalance(fresh[1], n_workers), "drifted_planner": second.forecast.imbalance_after,
        "moves": second.forecast.moved_replicas, "fresh_moves": len(_held(fresh[1]) - _held(fresh[0])),
    }  # fmt: skip


def _equal(loads_LE: Floats, n_workers: int, n_slots: int) -> Layout:
    worker_S = np.repeat(np.arange(n_workers), n_slots // n_workers)
    layout = replicate_and_pack(loads_LE, worker_S, np.ones(n_workers))
    return Layout(layout.expert_LS, equally(loads_LE, layout.expert_LS), worker_S)


def _imbalance(layout: Layout, n_workers: int) -> float:
    times_LW = layout.times(np.ones(n_workers))
    return float(times_LW.max(1).sum() / times_LW.mean(1).sum())


def _held(layout: Layout) -> set[tuple[int, int, int]]:
    layers, slots = np.nonzero(layout.expert_LS >= 0)
    experts, workers = layout.expert_LS[layers, slots], layout.worker_S[slots]
    return set(zip(layers.tolist(), experts.tolist(), workers.tolist(), strict=True))


if __name__ == "__main__":
    run(placement)
