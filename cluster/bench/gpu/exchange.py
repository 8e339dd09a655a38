"""What it costs to have the experts in other processes of the same GPU, a layer: through device memory, and over gRPC.

`python -m cluster.bench.gpu.exchange [--layers 8] [--rows 64] [--workers 2]`: random Mixtral 8x7B of so many layers, a
decoding step with its experts here and elsewhere in turn, under NVIDIA's multi-process service. Prints one line; with
--json, one object. A process of its own, since that service has to be there before CUDA is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.bench.gpu.random_model import all_experts, dense_of, of_depth, shard_of
from cluster.bench.gpu.workers import Workers
from cluster.fleet.mps import Mps
from cluster.placement.placement import striped
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.spec import ModelSpec

CONTEXT, BLOCK = 512, 16
REPEATS, WARM_UP = 25, 5


def measure(n_layers: int, n_rows: int, n_workers: int) -> dict[str, Any]:
    """Milliseconds of a step, medians of turns, and microseconds a layer more than in one process, by transport.

    Captured steps are compared with captured ones, those layer by layer (gRPC) with such. NCCL is not among them: it
    wants a GPU for each process.
    """
    from cluster.bench.gpu.device_memory import through_device_memory  # needs Triton, which is there where a GPU is

    spec, device = of_depth(n_layers), torch.device("cuda", 0)
    with workers_of(spec, n_workers, device) as away, torch.inference_mode():
        dense, cache = dense_of(spec, device), cache_of(spec, n_rows, device)
        here = Decoder(spec, dense, shard_of(spec, all_experts(spec), device), cache)
        found = {"device memory": through_device_memory(here, away, n_rows)}
        with away.reached("router-0", device, spec.dtype) as exchange:
            found["grpc"] = over_grpc(here, Decoder(spec, dense, exchange, cache), n_rows)
    return {
        "gpu": torch.cuda.get_device_name(0), "layers": n_layers, "rows": n_rows, "workers": n_workers,
        "transports": found,
    }  # fmt: skip


def over_grpc(here: Decoder, away: Decoder, n_rows: int) -> dict[str, Any]:
    """Steps layer by layer: with the experts in this process, and over an exchange."""

    def step(decoder: Decoder) -> Callable[[int], Tensor]:
        def run(number: int) -> Tensor:
            decoder.experts.begin_step(number)
            return decoder.forward([batch_of(n_rows, decoder.spec.vocab_size)])

        return run

    return compare(here.spec.n_layers, {"here": step(here), "away": step(away)})


def compare(n_layers: int, steps: Mapping[str, Callable[[int], Tensor]]) -> dict[str, Any]:
    """Both in turn, each from call to the end of its last kernel: medians, their difference, whether bits are equal."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    logits: dict[str, Tensor] = {}
    for number in range(REPEATS):
        for name, step in steps.items():
            _finish()
            began = time.perf_counter()
            found = step(number)
            _finish()
            took[name].append((time.perf_counter() - began) * 1000)
            logits[name] = found.clone()
    here_ms, away_ms = (statistics.median(took[name][WARM_UP:]) for name in ("here", "away"))
    return {
        "one_process_ms": round(here_ms, 3), "ms": round(away_ms, 3), "ratio": round(here_ms / away_ms, 3),
        "us_a_layer": round((away_ms - here_ms) * 1000 / n_layers, 1),
        "same_bits": torch.equal(logits["here"], logits["away"]),
    }  # fmt: skip


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def workers_of(spec: ModelSpec, n_workers: int, device: torch.device) -> Workers:
    """So many worker processes, which have the experts of the random model between them."""
    placement = striped(spec.n_layers, spec.n_experts, [f"worker-{number}" for number in range(n_workers)])
    return Workers(placement, partial(shard_of, spec, device=device), "random")


def cache_of(spec: ModelSpec, n_rows: int, device: torch.device) -> KVCache:
    """Of zeros, with room for the batch."""
    cache = KVCache(spec, n_rows * CONTEXT // BLOCK, BLOCK, spec.dtype, device)
    for kept in (*cache.k, *cache.v):
        kept.zero_()
    return cache


def batch_of(n_rows: int, vocab_size: int) -> Batch:
    """One row of each of so many sequences of CONTEXT tokens."""
    table = torch.arange(n_rows * CONTEXT // BLOCK, dtype=torch.int32).view(n_rows, -1)
    position = torch.full((n_rows,), CONTEXT - 1)
    slot = table[:, -1].long() * BLOCK + (CONTEXT - 1) % BLOCK
    token = torch.randint(vocab_size, (n_rows,), generator=torch.Generator().manual_seed(2))
    starts = tuple(range(n_rows + 1))
    return Batch(token, position, slot, starts, torch.full((n_rows,), CONTEXT).int(), table, torch.arange(n_rows))


# The process of its own.


def in_a_process(n_layers: int, n_rows: int, n_workers: int = 2) -> dict[str, Any] | str:
    """`measure` in a process of its own; why it has no result."""
    sizes = ("--layers", n_layers, "--rows", n_rows, "--workers", n_workers)
    command = [sys.executable, "-m", __spec__.name, "--json", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it said nothing"]
    if done.returncode != 0:
        return lines[-1]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mps = Mps(Path(directory))
        if why := mps.start():
            print(f"without the multi-process service: {why}", file=sys.stderr)
        else:
            os.environ.update(mps.variables)
        try:
            found = measure(given.layers, given.rows, given.workers)
        finally:
            mps.stop()
    if given.json:
        print(json.dumps(found))
    else:
        print(", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
