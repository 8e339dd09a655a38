"""The same GPUs under plain tensor parallelism, the alternative that a plan has to be honest about."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.plan.gpu_types import PRODUCTS, READS, GpuType
from cluster.plan.model_size import BF16, ModelSize
from cluster.plan.ours import CONTEXT_BYTES, LAYER_S, WORK_BYTES, Load

_ALL_REDUCE_S = 12e-6  # of few rows between the GPUs of a host, beside its bytes; two in a layer


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """`replicas` copies of the model, each cut over `degree` GPUs of one host."""

    size: ModelSize
    gpu: GpuType
    degree: int
    replicas: int
    utilization: float = 0.9

    @property
    def kv_tokens(self) -> int:
        """Tokens that all replicas' KV caches hold."""
        size = self.size
        weights = size.dense_bytes + size.experts_bytes
        room = self.degree * (self.gpu.memory_bytes * self.utilization - CONTEXT_BYTES - WORK_BYTES) - weights
        return max(0, int(room)) // size.kv_bytes_per_token * self.replicas

    def step_s(self, load: Load) -> float:
        """Seconds of a decoding step: all bytes and operations divided by `degree`, and two all-reduces a layer."""
        size, spec = self.size, self.size.spec
        rows = load.sequences / self.replicas
        read = size.experts_asked(rows) * size.n_sparse * size.expert_bytes
        read += (spec.n_layers * size.layer_parameters + size.head_parameters) * BF16
        read += rows * load.context * size.kv_bytes_per_token
        speed = self.degree * self.gpu.memory_tb_s * 1e12 * READS
        compute = 2 * rows * size.active_parameters / (self.degree * self.gpu.bf16_tflops * 1e12 * PRODUCTS)
        alone = spec.n_layers * LAYER_S + max(read / speed, compute)
        if self.degree == 1:
            return alone
        moved = 2 * (self.degree - 1) / self.degree * rows * size.row_bytes / (self.gpu.link_gb_s * 1e9)
        return alone + 2 * spec.n_layers * (_ALL_REDUCE_S + moved)

    def tokens_per_s(self, load: Load) -> float:
        return load.sequences / self.step_s(load)


def best_on(size: ModelSize, gpu: GpuType, n_gpus: int, load: Load, utilization: float = 0.9) -> TensorParallel | None:
    """The fastest way to cut the model over at most `n_gpus` with room for `load`; None when it does not fit."""
    found = []
    for degree in (1, 2, 4, 8):
        if degree <= min(n_gpus, gpu.per_host) and size.spec.n_kv_heads % degree == 0:
            way = TensorParallel(size, gpu, degree, n_gpus // degree, utilization)
            if way.kv_tokens >= load.sequences * load.context:
                found.append(way)
    return max(found, key=lambda way: way.tokens_per_s(load), default=None)
