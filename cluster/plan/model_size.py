"""How large a model is: parameters, bytes of an expert, of the dense half, of a token in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from workers.spec import ModelSpec
from workers.weights import FORMATS, WeightFormat

BF16 = 2


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of one model in 16-bit numbers, its experts' weights in `expert_format`.

    Mixtral 8x7B (arXiv 2401.04088, table 1): 46.7 billion parameters, 12.9 of them active for a token; an expert of a
    layer has 352 MB in bf16, a token 128 KiB of keys and values.
    """

    spec: ModelSpec
    expert_format: WeightFormat = FORMATS["bfloat16"]

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer: gate, up and down."""
        return 3 * self.spec.hidden_size * self.spec.ffn_size

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        return self.expert_format.expert_bytes(self.spec.hidden_size, self.spec.ffn_size)

    @property
    def n_sparse(self) -> int:
        """Layers with experts."""
        return len(self.spec.sparse_layers)

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        spec = self.spec
        return 2 * spec.hidden_size * spec.head_dim * (spec.n_heads + spec.n_kv_heads)

    @property
    def layer_parameters(self) -> float:
        """What a router reads of one layer, averaged over the layers: attention, gate, FFNs that every token takes."""
        spec = self.spec
        gates = self.n_sparse * (spec.hidden_size * spec.n_experts + 3 * spec.hidden_size * spec.shared_ffn_size)
        dense = len(spec.dense_layers) * 3 * spec.hidden_size * spec.dense_ffn_size
        return self.attention_parameters + 2 * spec.hidden_size + (gates + dense) / spec.n_layers

    @property
    def head_parameters(self) -> int:
        """The output layer, which a step reads whole."""
        return self.spec.vocab_size * self.spec.hidden_size

    @property
    def dense_parameters(self) -> int:
        """All that each router holds."""
        tables = self.head_parameters * (1 if self.spec.tie_embeddings else 2)
        return round(self.spec.n_layers * self.layer_parameters) + tables + self.spec.hidden_size

    @property
    def parameters(self) -> int:
        """All."""
        return self.dense_parameters + self.n_sparse * self.spec.n_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Those that a token is computed with."""
        return self.dense_parameters + self.n_sparse * self.spec.top_k * self.expert_parameters

    @property
    def dense_bytes(self) -> int:
        return self.dense_parameters * BF16

    @property
    def experts_bytes(self) -> int:
        """All experts of all layers, once."""
        return self.n_sparse * self.spec.n_experts * self.expert_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.spec.n_layers * self.spec.n_kv_heads * self.spec.head_dim * BF16

    @property
    def row_bytes(self) -> int:
        """One token row between router and expert worker."""
        return self.spec.hidden_size * BF16

    def experts_asked(self, n_rows: float) -> float:
        """How many experts of a layer `n_rows` tokens ask, on average, when they choose evenly and independently."""
        spec = self.spec
        return float(spec.n_experts * (1 - (1 - spec.top_k / spec.n_experts) ** n_rows)) if spec.n_experts else 0.0

    def workers_asked(self, n_workers: int) -> float:
        """How many of `n_workers` a token's experts live on, on average; each gets its row once."""
        spec = self.spec
        held = spec.n_experts / n_workers
        missed = 1.0
        for chosen in range(spec.top_k):
            missed *= max(0.0, spec.n_experts - held - chosen) / (spec.n_experts - chosen)
        return n_workers * (1 - missed)
