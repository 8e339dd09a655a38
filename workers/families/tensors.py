"""Names and shapes of a model's tensors on disk.

Shape legend: V vocabulary, D hidden size, E experts, F expert FFN size, S shared FFN size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workers.spec import ModelSpec

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]  # by the field they become: name on disk and shape


@dataclass(frozen=True, slots=True)
class Layout:
    """How the part of a layer after its attention is named, below `model.layers.L.`.

    Experts have a tensor each (`expert`: w1, w2 and w3, `{}` stands for the number) or lie one after the other in two
    tensors (`fused`: [E, 2F, D], rows of w1 then rows of w3, and [E, D, F]).
    """

    gate: str = "mlp.gate.weight"
    gate_bias: str = "mlp.gate.e_score_correction_bias"
    expert: tuple[str, str, str] | None = None
    fused: tuple[str, str] | None = None
    ffn: str = "mlp"  # of a layer without experts
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate.weight"


PER_EXPERT = Layout(
    expert=("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.down_proj.weight", "mlp.experts.{}.up_proj.weight")
)
FUSED = Layout(fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The tensors of a model of the sizes of `spec`, named as in `layout`."""

    spec: ModelSpec
    layout: Layout

    def embed(self) -> tuple[str, Shape]:
        return "model.embed_tokens.weight", (self.spec.vocab_size, self.spec.hidden_size)

    def norm(self) -> tuple[str, Shape]:
        return "model.norm.weight", (self.spec.hidden_size,)

    def head(self) -> tuple[str, Shape]:
        """The output head. Not on disk (or ignored there) when it is tied to the embedding."""
        return "lm_head.weight", (self.spec.vocab_size, self.spec.hidden_size)

    def layer(self, layer: int) -> Tensors:
        """The dense tensors of one layer but its FFN, keyed by their field in `DenseLayer`."""
        spec, prefix = self.spec, f"model.layers.{layer}."
        attention, hidden = prefix + "self_attn.", spec.hidden_size
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        tensors = {
            "input_norm_D": (prefix + "input_layernorm.weight", (hidden,)),
            "q": (attention + "q_proj.weight", (q, hidden)),
            "k": (attention + "k_proj.weight", (kv, hidden)),
            "v": (attention + "v_proj.weight", (kv, hidden)),
            "o": (attention + "o_proj.weight", (hidden, q)),
            "post_norm_D": (prefix + "post_attention_layernorm.weight", (hidden,)),
        }
        if spec.qkv_bias:
            tensors |= {
                f"{name}_bias": (f"{attention}{name}_proj.bias", (rows,))
                for name, rows in (("q", q), ("k", kv), ("v", kv))
            }
        if spec.qk_norm is not None:
            sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (q, kv)
            tensors |= {
                f"{name}_norm": (f"{attention}{name}_norm.weight", (size,))
                for name, size in zip("qk", sizes, strict=True)
            }
        if layer not in spec.dense_layers:
            tensors["gate_ED"] = (prefix + self.layout.gate, (spec.n_experts, hidden))
            if spec.gate_bias:
                tensors["gate_bias_E"] = (prefix + self.layout.gate_bias, (spec.n_experts,))
            if spec.shared_ffn_size and spec.shared_gate:
                tensors["shared_gate_1D"] = (prefix + self.layout.shared_gate, (1, hidden))
        return tensors

    def ffn(self, layer: int) -> Tensors:
        """The FFN of a layer without experts, or the one beside them; nothing where there is neither."""
        dense = layer in self.spec.dense_layers
        size = self.spec.dense_ffn_size if dense else self.spec.shared_ffn_size
        prefix = f"model.layers.{layer}.{self.layout.ffn if dense else self.layout.shared}."
        names = tuple(f"{prefix}{name}_proj.weight" for name in ("gate", "down", "up"))
        return self._swiglu(names, size) if size else {}

    def expert(self, layer: int, expert: int) -> Tensors:
        """The tensors of one expert, keyed by their field in `ExpertWeights`; nothing where they are fused."""
        prefix = f"model.layers.{layer}."
        return self._swiglu(
            tuple(prefix + name.format(expert) for name in self.layout.expert or ()), self.spec.ffn_size
        )

    def fused_experts(self, layer: int) -> Tensors:
        """The tensors of all experts of one layer, `gate_up` and `down`; nothing where each has its own."""
        hidden, ffn, experts = self.spec.hidden_size, self.spec.ffn_size, self.spec.n_experts
        shapes = ((experts, 2 * ffn, hidden), (experts, hidden, ffn))
        names = [f"model.layers.{layer}.{name}" for name in self.layout.fused or ()]
        return dict(zip(("gate_up", "down"), zip(names, shapes, strict=False), strict=False)) if names else {}

    def experts(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """Every tensor of the experts of one layer."""
        yield from self.fused_experts(layer).values()
        for expert in range(self.spec.n_experts):
            yield from self.expert(layer, expert).values()

    def dense(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor but those of the experts, in the order of the computation."""
        yield self.embed()
        for layer in range(self.spec.n_layers):
            yield from self.layer(layer).values()
            yield from self.ffn(layer).values()
        yield self.norm()
        if not self.spec.tie_embeddings:
            yield self.head()

    def every(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor a checkpoint must hold."""
        yield from self.dense()
        for layer in self.spec.sparse_layers:
            yield from self.experts(layer)

    def _swiglu(self, names: tuple[str, ...], size: int) -> Tensors:
        """w1, w2 and w3 under their `names`."""
        shapes = ((size, self.spec.hidden_size), (self.spec.hidden_size, size), (size, self.spec.hidden_size))
        return dict(zip(("w1_FD", "w2_DF", "w3_FD"), zip(names, shapes, strict=False), strict=False)) if names else {}
