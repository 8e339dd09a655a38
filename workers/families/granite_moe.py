"""Granite-MoE (Granite 3.0): a Mixtral with multipliers of embedding, scores, residual branches and logits."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.tensors import Layout
from workers.spec import ModelSpec

_BLOCK = "block_sparse_moe."


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    return {
        "ffn_size": config.get("intermediate_size", int),
        "n_experts": config.get("num_local_experts", int),
        "top_k": config.get("num_experts_per_tok", int),
        "sliding_window": None,
        "attention_scale": config.get("attention_multiplier", float, 1.0),
        "embed_scale": config.get("embedding_multiplier", float, 1.0),
        "residual_scale": config.get("residual_multiplier", float, 1.0),
        "logits_scaling": config.get("logits_scaling", float, 1.0),
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "intermediate_size": spec.ffn_size,
        "num_local_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "attention_multiplier": spec.scale,
        "embedding_multiplier": spec.embed_scale,
        "residual_multiplier": spec.residual_scale,
        "logits_scaling": spec.logits_scaling,
    }


def _typical(spec: ModelSpec) -> dict[str, Any]:
    return {"attention_scale": 0.1, "embed_scale": 12.0, "residual_scale": 0.22, "logits_scaling": 6.0}


GRANITE_MOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    layouts=(
        Layout(
            gate=_BLOCK + "router.layer.weight",
            fused=(_BLOCK + "input_linear.weight", _BLOCK + "output_linear.weight"),
        ),
        Layout(
            gate=_BLOCK + "router.weight",
            fused=(_BLOCK + "experts.gate_up_proj", _BLOCK + "experts.down_proj"),
        ),
    ),
    read=_read,
    write=_write,
    typical=_typical,
    max_context=2048,
)
