"""GLM-4.5 (arXiv 2508.06471): sigmoid scores, a bias to choose by, shared experts, dense layers first, half of each
head rotated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.tensors import FUSED, PER_EXPERT
from workers.spec import ModelSpec


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    config.allow("n_group", 1)
    config.allow("topk_group", 1)
    config.allow("scoring_func", "sigmoid")
    ffn_size, n_dense = config.get("moe_intermediate_size", int), config.get("first_k_dense_replace", int, 1)
    return {
        "ffn_size": ffn_size,
        "n_experts": config.get("n_routed_experts", int),
        "top_k": config.get("num_experts_per_tok", int),
        "sliding_window": None,
        "qkv_bias": config.get("attention_bias", bool, False),
        "qk_norm": "head" if config.get("use_qk_norm", bool, False) else None,
        "gate_score": "sigmoid",
        "gate_bias": True,
        "gate_normalize": config.get("norm_topk_prob", bool, True),
        "gate_scale": config.get("routed_scaling_factor", float, 1.0),
        "dense_layers": frozenset(range(min(n_dense, n_layers))),
        "dense_ffn_size": config.get("intermediate_size", int) if n_dense > 0 else 0,
        "shared_ffn_size": ffn_size * config.get("n_shared_experts", int, 1),
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "moe_intermediate_size": spec.ffn_size,
        "n_routed_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "attention_bias": spec.qkv_bias,
        "use_qk_norm": spec.qk_norm is not None,
        "norm_topk_prob": spec.gate_normalize,
        "routed_scaling_factor": spec.gate_scale,
        "first_k_dense_replace": len(spec.dense_layers),
        "intermediate_size": spec.dense_ffn_size or spec.ffn_size,
        "n_shared_experts": spec.shared_ffn_size // spec.ffn_size,
        "n_group": 1,
        "topk_group": 1,
        "partial_rotary_factor": spec.rotary_size / spec.head_dim,
    }


def _typical(spec: ModelSpec) -> dict[str, Any]:
    return {
        "rotary_dim": spec.head_dim // 4 * 2,
        "qkv_bias": True,
        "qk_norm": "head",
        "gate_score": "sigmoid",
        "gate_bias": True,
        "gate_scale": 1.5,
        "dense_layers": frozenset({0}),
        "dense_ffn_size": spec.ffn_size * spec.top_k,
        "shared_ffn_size": spec.ffn_size,
    }


_SHARED = "mlp.shared_experts"

GLM4_MOE = Family(
    "glm4_moe", "Glm4MoeForCausalLM", (replace(PER_EXPERT, shared=_SHARED), replace(FUSED, shared=_SHARED)),
    _read, _write, _typical, norm_eps=1e-5, max_context=131072, rotary_share=0.5,
)  # fmt: skip
