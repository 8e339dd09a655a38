"""The least time that a step can take: bytes it has to read over the memory's speed, operations over the units'."""

from __future__ import annotations

from cluster.bench.gpu.ceilings import Ceilings
from workers.spec import ModelSpec


def decode_s(spec: ModelSpec, batch: int, context: int, expert_bytes: int, top: Ceilings) -> float:
    """A step of `batch` sequences with `context` tokens each; every expert that is asked is read once.

    Experts asked: as many as even and independent choices ask on average.
    """
    asked = spec.n_experts * (1 - (1 - spec.top_k / spec.n_experts) ** batch)
    heads = 2 * (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    dense = 2 * (spec.n_layers * heads * spec.hidden_size + spec.vocab_size * spec.hidden_size)
    cache = 2 * 2 * spec.n_layers * batch * context * spec.n_kv_heads * spec.head_dim
    return (spec.n_layers * asked * expert_bytes + dense + cache) / top.copy


def prefill_s(spec: ModelSpec, n_tokens: int, expert_bytes: int, top: Ceilings) -> float:
    """A prompt: its products and causal attention, or the reading of the weights where that takes longer."""
    heads = 2 * (spec.n_heads + spec.n_kv_heads) * spec.head_dim * spec.hidden_size
    experts = 3 * spec.top_k * spec.hidden_size * spec.ffn_size
    attention = n_tokens * spec.n_heads * spec.head_dim
    operations = 2 * n_tokens * spec.n_layers * (heads + experts + attention)
    return max(operations / top.bf16, decode_s(spec, n_tokens, 1, expert_bytes, top))
