"""What it costs to have the experts in other processes of the same GPU, a layer: through device memory, and over gRPC.

`python -m cluster.bench.gpu.exchange [--layers 8] [--rows 64] [--workers 2]`: random Mixtral 8x7B of so many layers, a
decoding step with its experts here and elsewhere in turn, under NVIDIA's multi-process service. Prints one line; with
--json, one object. A process of its own, since that service has to be there before CUDA is used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.bench.gpu.random_model import of_depth
from cluster.fleet.mps import Mps
from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from workers.checkpoint import DenseLayer, DenseWeights, ExpertWeights
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.transport.base import FastWay
from workers.transport.device.acceptor import DeviceAcceptor
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer

CONTEXT, BLOCK = 512, 16
REPEATS, WARM_UP = 25, 5
LIMIT_S = 1.0
_MODEL = "random"  # what both ends call the checkpoint


def measure(n_layers: int, n_rows: int, n_workers: int) -> dict[str, Any]:
    """Milliseconds of a step, medians of turns, and microseconds a layer more than in one process, by transport.

    Captured steps are compared with captured ones, those layer by layer (gRPC) with such. NCCL is not among them: it
    wants a GPU for each process.
    """
    from cluster.bench.gpu.device_memory import through_device_memory  # needs Triton, which is there where a GPU is

    spec, device = of_depth(n_layers), torch.device("cuda", 0)
    with Workers.started(spec, n_workers, device) as away, torch.inference_mode():
        dense, cache = dense_of(spec, device), cache_of(spec, n_rows, device)
        here = Decoder(spec, dense, shard_of(spec, [*all_experts(spec)], device), cache)
        found = {"device memory": through_device_memory(here, away, n_rows)}
        with away.reached("router-0") as exchange:
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


# The model: the same weights in every process.


def matrix(seed: int, n: int, k: int, spec: ModelSpec, device: torch.device) -> Tensor:
    draw = torch.Generator(device).manual_seed(seed)
    return torch.empty(n, k, dtype=spec.dtype, device=device).normal_(0, k**-0.5, generator=draw)


def all_experts(spec: ModelSpec) -> Iterator[tuple[int, int]]:
    return ((layer, expert) for layer in range(spec.n_layers) for expert in range(spec.n_experts))


def shard_of(spec: ModelSpec, experts: list[tuple[int, int]], device: torch.device) -> ExpertShard:
    """A shard with `experts`."""
    shard = ExpertShard(spec, device, spec.dtype)
    shard.reserve(len(experts))
    d, f = spec.hidden_size, spec.ffn_size
    for layer, expert in experts:
        seed = 10_000 + 10 * (spec.n_experts * layer + expert)
        w1, w2, w3 = (
            matrix(seed + index, *shape, spec, device) for index, shape in enumerate(((f, d), (d, f), (f, d)))
        )
        shard.load(layer, expert, ExpertWeights(w1, w2, w3))
    return shard


def dense_of(spec: ModelSpec, device: torch.device) -> DenseWeights:
    """All but the experts."""
    d, q, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    one = torch.ones(d, dtype=spec.dtype, device=device)

    def layer(n: int) -> DenseLayer:
        shapes = ((q, d), (kv, d), (kv, d), (d, q), (spec.n_experts, d))
        w_q, w_k, w_v, w_o, gate_ED = (matrix(10 * (n + 1) + i, *shape, spec, device) for i, shape in enumerate(shapes))
        return DenseLayer(one, w_q, w_k, w_v, w_o, one, gate_ED=2 * gate_ED)

    embed_VD, head_VD = (matrix(seed, spec.vocab_size, d, spec, device) for seed in (1, 2))
    return DenseWeights(embed_VD * d**0.5, one, head_VD, tuple(map(layer, range(spec.n_layers))))


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


# The workers.


class Workers:
    """Processes with the experts."""

    def __init__(
        self,
        placement: Placement,
        addresses: dict[str, str],
        credentials: Credentials,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.placement = placement
        self._addresses, self._credentials, self._device, self._dtype = addresses, credentials, device, dtype

    @classmethod
    @contextmanager
    def started(cls, spec: ModelSpec, n_workers: int, device: torch.device) -> Iterator[Workers]:
        """They end with the context."""
        context, credentials = multiprocessing.get_context("spawn"), Credentials.generate()
        placement = striped(spec.n_layers, spec.n_experts, [f"worker-{number}" for number in range(n_workers)])
        pipes, processes = [], []
        try:
            for name in placement.workers:
                pipe, other = context.Pipe()
                arguments = (other, spec, name, [*placement.shard(name)], device, credentials)
                processes.append(context.Process(target=serve, args=arguments, daemon=True))
                processes[-1].start()
                other.close()  # so that a worker that ends is noticed
                pipes.append(pipe)
            addresses = {name: pipe.recv() for name, pipe in zip(placement.workers, pipes, strict=True)}
            yield cls(placement, addresses, credentials, device, spec.dtype)
        finally:
            for process in processes:
                process.kill()

    @contextmanager
    def reached(self, router: str, ways: Sequence[FastWay] = ()) -> Iterator[Exchange]:
        """An exchange with them, over gRPC but for what `ways` take."""
        transport = GrpcTransport(router, _MODEL, self._credentials, ways=ways)
        try:
            yield Exchange(
                self.placement, self._addresses, transport, reply_timeout_s=60, rejoin_timeout_s=60,
                device=self._device, dtype=self._dtype,
            )  # fmt: skip
        finally:
            transport.close()


def serve(
    pipe: Connection,
    spec: ModelSpec,
    worker: str,
    experts: list[tuple[int, int]],
    device: torch.device,
    credentials: Credentials,
) -> None:
    """The life of a worker process: it ends when it is killed, or with its pipe."""
    shard = shard_of(spec, experts, device)
    ways = []
    if device.type == "cuda":
        torch.cuda.set_device(device)
        steps = DeviceServer(shard, LIMIT_S)
        ways.append(lambda batcher: DeviceAcceptor(steps, StreamRows()))
    server = ExpertServer(shard, worker, "127.0.0.1", model=_MODEL, credentials=credentials, ways=ways)
    server.start()
    pipe.send(server.address)
    with suppress(EOFError):
        pipe.recv()


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
