"""A decoding step whose experts are in other processes of the same GPU, against the same step in one process.

`python -m benchmarks.device_steps [--layers 8] [--rows 64] [--workers 2]`: random Mixtral 8x7B of so many layers, both
ways captured and run in turn, under NVIDIA's multi-process service. Prints one line; with --json, one object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster.fleet.mps import Mps
from workers.checkpoint import DenseLayer, DenseWeights, ExpertWeights
from workers.model.batch import Batch
from workers.model.decode_graphs import DecodeGraphs
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.transport.base import Tag
from workers.transport.device.offer import Shape
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay

SPEC = ModelSpec(
    hidden_size=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_size=14336, n_experts=8, top_k=2,
    vocab_size=32000, rope_theta=1e6, norm_eps=1e-5, sliding_window=None, tie_embeddings=False, max_context=32768,
    bos_id=1, eos_ids=(2,), dtype=torch.bfloat16,
)  # fmt: skip
CONTEXT, BLOCK = 512, 16
LIMIT_S = 1.0


def matrix(seed: int, n: int, k: int) -> Tensor:
    """The same weights in every process."""
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, k**-0.5, generator=draw)


def shard_of(spec: ModelSpec, experts: list[tuple[int, int]]) -> ExpertShard:
    """A shard on the GPU with `experts`."""
    shard = ExpertShard(spec, "cuda:0", spec.dtype)
    shard.reserve(len(experts))
    d, f = spec.hidden_size, spec.ffn_size
    for layer, expert in experts:
        seed = 10_000 + 10 * (spec.n_experts * layer + expert)
        shard.load(layer, expert, ExpertWeights(matrix(seed, f, d), matrix(seed + 1, d, f), matrix(seed + 2, f, d)))
    return shard


def decoder_of(spec: ModelSpec, n_rows: int) -> Decoder:
    """The whole model in this process."""
    d, q, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    one = torch.ones(d, dtype=spec.dtype, device="cuda")
    layers = tuple(
        DenseLayer(
            one, matrix(10 * n, q, d), matrix(10 * n + 1, kv, d), matrix(10 * n + 2, kv, d), matrix(10 * n + 3, d, q),
            one, gate_ED=2 * matrix(10 * n + 4, spec.n_experts, d),
        )
        for n in range(spec.n_layers)
    )  # fmt: skip
    dense = DenseWeights(matrix(1, spec.vocab_size, d) * d**0.5, one, matrix(2, spec.vocab_size, d), layers)
    every = [(layer, expert) for layer in range(spec.n_layers) for expert in range(spec.n_experts)]
    cache = KVCache(spec, n_rows * CONTEXT // BLOCK, BLOCK, spec.dtype, "cuda:0")
    for kept in (*cache.k, *cache.v):
        kept.zero_()
    return Decoder(spec, dense, shard_of(spec, every), cache)


def batch_of(n_rows: int) -> Batch:
    """One row of each of so many sequences of CONTEXT tokens."""
    table = torch.arange(n_rows * CONTEXT // BLOCK, dtype=torch.int32).view(n_rows, -1)
    position = torch.full((n_rows,), CONTEXT - 1)
    slot = table[:, -1].long() * BLOCK + (CONTEXT - 1) % BLOCK
    token = torch.randint(SPEC.vocab_size, (n_rows,), generator=torch.Generator().manual_seed(2))
    starts = tuple(range(n_rows + 1))
    return Batch(token, position, slot, starts, torch.full((n_rows,), CONTEXT).int(), table, torch.arange(n_rows))


def serve(pipe: Connection, spec: ModelSpec, experts: list[tuple[int, int]]) -> None:
    """The life of a worker process."""
    torch.cuda.set_device(0)
    server = DeviceServer(shard_of(spec, experts), LIMIT_S)
    accepted = server.accept(json.loads(pipe.recv())["steps"], "router")
    pipe.send(json.dumps({"steps": accepted.text, "other": ""}))
    accepted.start()
    pipe.recv()


def milliseconds(graphs: DecodeGraphs, batch: Batch, way: DeviceWay | None) -> tuple[float, Tensor]:
    """One step from call to the end of its last kernel, and its logits."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    assert way is None or way.begin_step(batch.n_rows, Tag(0, 0, 0, 0, 0, 0), 1.0), "the workers do not answer"
    logits = graphs.run(batch, range(batch.n_rows))
    torch.cuda.synchronize()
    took = (time.perf_counter() - began) * 1000
    if way is not None:
        assert way.end_step() is not None, "the step is void"
    return took, logits


def measure(n_layers: int, n_rows: int, n_workers: int) -> dict[str, object]:
    """Medians of both ways in milliseconds, their ratio, and whether the logits are the same bits."""
    spec = replace(SPEC, n_layers=n_layers)
    context = multiprocessing.get_context("spawn")
    owner_LE = np.array([[(e + n) % n_workers for e in range(spec.n_experts)] for n in range(n_layers)])
    pipes, processes = [], []
    for worker in range(n_workers):
        pipe, other = context.Pipe()
        mine = [(int(layer), int(expert)) for layer, expert in zip(*np.nonzero(owner_LE == worker), strict=True)]
        processes.append(context.Process(target=serve, args=(other, spec, mine), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    try:
        with torch.inference_mode():
            decoder = decoder_of(spec, n_rows)
            shape = Shape(n_layers, spec.n_experts, spec.top_k, spec.hidden_size, spec.dtype, n_rows)
            way = DeviceWay(shape, torch.device("cuda", 0), LIMIT_S, StreamRows())
            names = tuple(f"worker-{worker}" for worker in range(n_workers))
            for name, pipe in zip(names, pipes, strict=True):
                offered = way.offer(name)
                assert offered is not None
                pipe.send(offered.text)
                offered.accepted(pipe.recv())
            one = DecodeGraphs(decoder, n_rows, CONTEXT)
            apart = DecodeGraphs(decoder, n_rows, CONTEXT)
            one.capture(n_rows)
            apart.capture(n_rows, experts=way.experts)
            while not way.ready(names, owner_LE.astype(np.int32)):
                time.sleep(0.01)
            batch = batch_of(n_rows)
            took: dict[str, list[float]] = {"one": [], "apart": []}
            logits: dict[str, Tensor] = {}
            for _ in range(25):
                for name, graphs, through in (("one", one, None), ("apart", apart, way)):
                    ms, found = milliseconds(graphs, batch, through)
                    took[name].append(ms)
                    logits[name] = found.clone()
    finally:
        for process in processes:
            process.kill()
    one_ms, apart_ms = (statistics.median(times[5:]) for times in took.values())
    return {
        "gpu": torch.cuda.get_device_name(0), "layers": n_layers, "rows": n_rows, "workers": n_workers,
        "one_process_ms": round(one_ms, 3), "device_memory_ms": round(apart_ms, 3),
        "ratio": round(one_ms / apart_ms, 3), "us_a_layer": round((apart_ms - one_ms) * 1000 / n_layers, 1),
        "same_bits": torch.equal(logits["one"], logits["apart"]),
    }  # fmt: skip


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
            print(f"without the multi-process service: {why}")
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
