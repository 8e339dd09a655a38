"""A random Mixtral made on the device, of any depth, in parts or whole; and as transformers' over the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        self,
        spec: ModelSpec,
        n_blocks: int,
        block_size: int = 16,
        weight_format: WeightFormat | None = None,
        device: torch.device | str = "cuda:0",
    ) -> None:
        self.spec = spec
        self.dense = dense_of(spec, device)
        self.shard = shard_of(spec, all_experts(spec), device, weight_format)
        self.decoder = Decoder(spec, self.dense, self.shard, KVCache(spec, n_blocks, block_size, spec.dtype, device))

    def transformers(self) -> Any:
        """`MixtralForCausalLM` whose experts, embedding and head are this model's memory; the rest is copied."""
        from transformers import MixtralConfig, MixtralForCausalLM

        spec = self.spec
        config = MixtralConfig(
            hidden_size=spec.hidden_size, intermediate_size=spec.ffn_size, num_attention_heads=spec.n_heads,
            num_key_value_heads=spec.n_kv_heads, num_local_experts=spec.n_experts, num_experts_per_tok=spec.top_k,
            vocab_size=spec.vocab_size, max_position_embeddings=spec.max_context, num_hidden_layers=spec.n_layers,
            sliding_window=None, rms_norm_eps=spec.norm_eps, dtype=spec.dtype,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        )  # fmt: skip
        with torch.device("meta"):
            model = MixtralForCausalLM(config).to(spec.dtype)

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
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device=self.dense.norm_D.device)
        model.set_experts_implementation("grouped_mm")
        return model.eval()


def of_depth(n_layers: int) -> ModelSpec:
    """Mixtral 8x7B with so many layers."""
    return replace(MIXTRAL_8X7B, n_layers=n_layers)


# Every matrix has a seed of its own, so that several processes make parts of one model.


def all_experts(spec: ModelSpec) -> Iterator[tuple[int, int]]:
    return ((layer, expert) for layer in range(spec.n_layers) for expert in range(spec.n_experts))


def shard_of(
    spec: ModelSpec,
    experts: Iterable[tuple[int, int]],
    device: torch.device | str,
    weight_format: WeightFormat | None = None,
) -> ExpertShard:
    """A shard with `experts`, (layer, expert) pairs."""
    wanted = tuple(experts)
    shard = ExpertShard(spec, device, spec.dtype, weight_format=weight_format)
    shard.reserve(len(wanted))
    d, f = spec.hidden_size, spec.ffn_size
    for layer, expert in wanted:
        seed = 10_000 + 10 * (spec.n_experts * layer + expert)
        w1, w2, w3 = (_matrix(seed + i, *shape, spec, device) for i, shape in enumerate(((f, d), (d, f), (f, d))))
        shard.load(layer, expert, ExpertWeights(w1, w2, w3))
    return shard


def dense_of(spec: ModelSpec, device: torch.device | str) -> DenseWeights:
    """All but the experts."""
    d, q, kv = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim

    def layer(n: int) -> DenseLayer:
        seed = 10 * (n + 1)
        shapes = ((q, d), (kv, d), (kv, d), (d, q), (spec.n_experts, d))
        w_q, w_k, w_v, w_o, gate_ED = (_matrix(seed + i, *shape, spec, device) for i, shape in enumerate(shapes))
        input_norm_D, post_norm_D = (_norm(seed + i, spec, device) for i in (5, 6))
        return DenseLayer(input_norm_D, w_q, w_k, w_v, w_o, post_norm_D, gate_ED=2 * gate_ED)

    embed_VD, head_VD = (_matrix(seed, spec.vocab_size, d, spec, device) for seed in (1, 2))
    return DenseWeights(
        embed_VD * d**0.5, _norm(3, spec, device), head_VD, tuple(layer(n) for n in range(spec.n_layers))
    )


def _matrix(seed: int, n: int, k: int, spec: ModelSpec, device: torch.device | str) -> Tensor:
    return _draw(seed, (n, k), 0, k**-0.5, spec, device)


def _norm(seed: int, spec: ModelSpec, device: torch.device | str) -> Tensor:
    return _draw(seed, (spec.hidden_size,), 1, 0.1, spec, device)


def _draw(
    seed: int, shape: tuple[int, ...], mean: float, deviation: float, spec: ModelSpec, device: torch.device | str
) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=spec.dtype, device=device).normal_(mean, deviation, generator=generator)


def _together(first: Tensor, n: int) -> Tensor:
    """The matrices that lie one after the other from `first` on, as one tensor."""
    return first.as_strided((n, *first.shape), (first.numel(), *first.stride()))
