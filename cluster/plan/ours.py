"""What M routers and N expert workers take and give: memory, KV room, traffic, and the time of a decoding step."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.plan.gpu_types import PRODUCTS, READS, GpuType
from cluster.plan.model_size import BF16, ModelSize

CONTEXT_BYTES = 2**29  # CUDA's own, in each process
WORK_BYTES = 2**30  # activations and logits of a router's step
FREE_SLOTS = 1  # experts that a worker keeps room for, so that one can move in

# What an exchange of few rows costs beside its bytes, there and back. Within a host captured steps through device
# memory (measured on one H200: 9 us); between hosts gRPC with a copy to the host on both ends (measured: 1.5 ms).
HOST_S, NETWORK_S = 9e-6, 1.5e-3
LAYER_S = 25e-6  # of a layer's kernels, beside bytes and operations: what one sequence on an H200 took above both


@dataclass(frozen=True, slots=True)
class Load:
    """What the cluster is to serve."""

    sequences: int  # open at once, all routers together
    context: int  # tokens of a sequence, prompt and answer so far, on average


@dataclass(frozen=True, slots=True)
class Layout:
    """M routers and N expert workers, one GPU each, of one kind. `n_workers` 0: one router holds everything."""

    size: ModelSize
    gpu: GpuType
    n_routers: int
    n_workers: int
    utilization: float = 0.9  # share of a GPU's memory that is taken

    @property
    def n_gpus(self) -> int:
        return self.n_routers + self.n_workers

    @property
    def budget(self) -> int:
        """Bytes of a GPU that are taken."""
        return int(self.gpu.memory_bytes * self.utilization)

    @property
    def worker_bytes(self) -> int:
        """Weights of a worker's shard and of its free slot, and CUDA's own."""
        if not self.n_workers:
            return 0
        size = self.size
        replicas = -(-size.n_sparse * size.spec.n_experts // self.n_workers)
        return (replicas + FREE_SLOTS) * size.expert_bytes + CONTEXT_BYTES

    @property
    def router_bytes(self) -> int:
        """What a router needs before its KV cache."""
        own = 0 if self.n_workers else self.size.experts_bytes
        return self.size.dense_bytes + own + CONTEXT_BYTES + WORK_BYTES

    @property
    def kv_bytes(self) -> int:
        """The KV cache of one router; below 0: it does not fit."""
        return self.budget - self.router_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that all routers' KV caches hold."""
        return max(0, self.kv_bytes) // self.size.kv_bytes_per_token * self.n_routers

    @property
    def fits(self) -> bool:
        return self.worker_bytes <= self.budget and self.kv_bytes >= self.size.kv_bytes_per_token * 1024

    def largest_batch(self, context: int) -> int:
        """Sequences of that many tokens that find room, all routers together."""
        return self.kv_tokens // context

    @property
    def one_host(self) -> bool:
        return self.n_gpus <= self.gpu.per_host

    def traffic(self, sequences: int) -> float:
        """Bytes of one layer of one step of one router, to the workers and back.

        A row goes once to each worker that holds one of its experts; a row comes back for each of its experts.
        """
        if not self.n_workers:
            return 0.0
        rows = sequences / self.n_routers
        return rows * (self.size.workers_asked(self.n_workers) + self.size.spec.top_k) * self.size.row_bytes

    def step_s(self, load: Load) -> float:
        """Seconds of a decoding step of one token for each sequence.

        A router's layers follow each other: dense half, exchange, experts. Workers compute what waits for a layer as
        one batch, so they are the limit where all routers' rows take them longer than one router's layer.
        """
        size, layers = self.size, self.size.spec.n_layers
        rows = load.sequences / self.n_routers
        dense = size.layer_parameters
        cache = rows * load.context * size.kv_bytes_per_token / layers
        attend = self._takes(dense * BF16 + cache, 2 * rows * dense, self.gpu.bf16_tflops)
        share = size.n_sparse / layers
        one = share * (self.exchange_s(load.sequences) + self._experts_s(rows))
        head = self._takes(size.head_parameters * BF16, 2 * rows * size.head_parameters, self.gpu.bf16_tflops)
        return layers * max(LAYER_S + attend + one, share * self._experts_s(load.sequences)) + head

    def exchange_s(self, sequences: int) -> float:
        """Seconds of one layer's dispatch and combine beside computing."""
        if not self.n_workers:
            return 0.0
        speed = (self.gpu.link_gb_s if self.one_host else self.gpu.network_gb_s) * 1e9
        return (HOST_S if self.one_host else NETWORK_S) + self.traffic(sequences) / speed

    def tokens_per_s(self, load: Load) -> float:
        return load.sequences / self.step_s(load)

    def _experts_s(self, rows: float) -> float:
        """The busiest worker's share of a layer for `rows` tokens, with even loads."""
        size, workers = self.size, max(1, self.n_workers)
        held = max(1.0, size.spec.n_experts / workers)  # more workers than experts: each layer is on some of them
        asked = size.experts_asked(rows) * held / size.spec.n_experts if size.spec.n_experts else 0.0
        pairs = rows * size.spec.top_k * held / max(1, size.spec.n_experts)
        units = self.gpu.fp8_tflops if size.expert_format.dtype.itemsize == 1 else self.gpu.bf16_tflops
        return self._takes(max(asked, min(pairs, 1.0)) * size.expert_bytes, 2 * pairs * size.expert_parameters, units)

    def _takes(self, n_bytes: float, operations: float, tflops: float) -> float:
        return max(n_bytes / (self.gpu.memory_tb_s * 1e12 * READS), operations / (tflops * 1e12 * PRODUCTS))
