"""The least time that a step can take: bytes it has to read over the memory's speed, operations over the units'."""

from __future__ import annotations

from cluster.bench.gpu.ceilings import Ceilings
from workers.spec import ModelSpec


def decode_s(spec: ModelSpec, batch: int, context: int, expert_bytes: int, top: Ceilings) -> float:
    """A step of `batch` sequences with `context` tokens each; every expert that is asked is read once.

    Experts asked: as many as even and independent choices ask on average.
    """
    asked = spec.n_experts * (1 - (1 - spec.top_k / spec.n_experts) ** batch) if spec.n_experts else 0
    dense = 2 * (_dense_inputs(spec) + spec.vocab_size * spec.hidden_size)
    cache = 2 * 2 * spec.n_layers * batch * context * spec.n_kv_heads * spec.head_dim
    return (_sparse_layers(spec) * asked * expert_bytes + dense + cache) / top.copy


def prefill_s(spec: ModelSpec, n_tokens: int, expert_bytes: int, top: Ceilings) -> float:
    """A prompt: its products and causal attention, or the reading of the weights where that takes longer."""
    experts = _sparse_layers(spec) * 3 * spec.top_k * spec.hidden_size * spec.ffn_size
    attention = spec.n_layers * n_tokens * spec.n_heads * spec.head_dim
    operations = 2 * n_tokens * (_dense_inputs(spec) + experts + attention)
    return max(operations / top.bf16, decode_s(spec, n_tokens, 1, expert_bytes, top))


def _sparse_layers(spec: ModelSpec) -> int:
    """Layers that have experts."""
    return spec.n_layers - len(spec.dense_layers)


def _dense_inputs(spec: ModelSpec) -> int:
    """Weights that every token goes through, but for the head's: of attention, of gates, of the FFNs of layers without
    experts, and of shared experts."""
    attention = 2 * (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    beside_experts = spec.n_experts + 3 * spec.shared_ffn_size
    return spec.hidden_size * (
        spec.n_layers * attention
        + _sparse_layers(spec) * beside_experts
        + len(spec.dense_layers) * 3 * spec.dense_ffn_size
    )
