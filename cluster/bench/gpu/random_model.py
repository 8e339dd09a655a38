"""A random Mixtral made on the device, of any depth: as our model, and as transformers' over the same memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import DenseLayer, DenseWeights, ExpertWeights
from workers.model.decoder import Decoder
from workers.model.kv_cache import KVCache
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.weights import WeightFormat

MIXTRAL_8X7B = ModelSpec(
    hidden_size=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_size=14336, n_experts=8, top_k=2,
    vocab_size=32000, rope_theta=1e6, norm_eps=1e-5, sliding_window=None, tie_embeddings=False, max_context=32768,
    bos_id=1, eos_ids=(2,), dtype=torch.bfloat16,
)  # fmt: skip


class RandomModel:
    """Weights such that activations and logits stay of order one; every expert different."""

    def __init__(
        self, spec: ModelSpec, n_blocks: int, block_size: int = 16, weight_format: WeightFormat | None = None
    ) -> None:
        self.spec = spec
        torch.manual_seed(0)
        d, f = spec.hidden_size, spec.ffn_size
        q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        layers = tuple(
            DenseLayer(
                input_norm_D=_norm(d), q=_matrix(q, d), k=_matrix(kv, d), v=_matrix(kv, d), o=_matrix(d, q),
                post_norm_D=_norm(d), gate_ED=2 * _matrix(spec.n_experts, d),
            )
            for _ in range(spec.n_layers)
        )  # fmt: skip
        self.dense = DenseWeights(_matrix(spec.vocab_size, d) * d**0.5, _norm(d), _matrix(spec.vocab_size, d), layers)
        self.shard = ExpertShard(spec, "cuda:0", torch.bfloat16, weight_format=weight_format)
        self.shard.reserve(spec.n_layers * spec.n_experts)
        for layer in range(spec.n_layers):
            for expert in range(spec.n_experts):
                self.shard.load(layer, expert, ExpertWeights(_matrix(f, d), _matrix(d, f), _matrix(f, d)))
        cache = KVCache(spec, n_blocks, block_size, torch.bfloat16, "cuda:0")
        self.decoder = Decoder(spec, self.dense, self.shard, cache)

    def transformers(self) -> Any:
        """`MixtralForCausalLM` whose experts, embedding and head are this model's memory; the rest is copied."""
        from transformers import MixtralConfig, MixtralForCausalLM

        spec = self.spec
        config = MixtralConfig(
            hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size, num_attention_heads=spec.n_heads,
            num_key_value_heads=spec.n_kv_heads, num_local_experts=spec.n_experts, num_experts_per_tok=spec.top_k,
            vocab_size=spec.vocab_size, max_position_embeddings=spec.max_context, num_hidden_layers=spec.n_layers,
            sliding_window=None, rms_norm_eps=spec.norm_eps, dtype=torch.bfloat16,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        )  # fmt: skip
        with torch.device("meta"):
            model = MixtralForCausalLM(config).to(torch.bfloat16)

        def put(module: Any, name: str, value: Tensor) -> None:
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))

        put(model.model.embed_tokens, "weight", self.dense.embed_VD)
        put(model.model.norm, "weight", self.dense.norm_D)
        put(model.lm_head, "weight", self.dense.head_VD)
        for index, (layer, ours) in enumerate(zip(model.model.layers, self.dense.layers, strict=True)):
            attention, experts = layer.self_attn, self.shard.weights(index)
            put(attention.q_proj, "weight", ours.q)
            put(attention.k_proj, "weight", ours.k)
            put(attention.v_proj, "weight", ours.v)
            put(attention.o_proj, "weight", ours.o)
            put(layer.input_layernorm, "weight", ours.input_norm_D)
            put(layer.post_attention_layernorm, "weight", ours.post_norm_D)
            assert ours.gate_ED is not None
            put(layer.mlp.gate, "weight", ours.gate_ED)
            w13, w2 = (matrix.values_ND for matrix in experts[0])  # slots lie one after the other, in expert order
            put(layer.mlp.experts, "gate_up_proj", _together(w13, spec.n_experts))
            put(layer.mlp.experts, "down_proj", _together(w2, spec.n_experts))
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
        model.set_experts_implementation("grouped_mm")
        return model.eval()


def of_depth(n_layers: int) -> ModelSpec:
    """Mixtral 8x7B with so many layers."""
    return replace(MIXTRAL_8X7B, n_layers=n_layers)


def _matrix(n: int, k: int) -> Tensor:
    return torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, k**-0.5)


def _norm(d: int) -> Tensor:
    return torch.empty(d, dtype=torch.bfloat16, device="cuda").normal_(1, 0.1)


def _together(first: Tensor, n: int) -> Tensor:
    """The matrices that lie one after the other from `first` on, as one tensor."""
    return first.as_strided((n, *first.shape), (first.numel(), *first.stride()))
