"""OLMoE (arXiv 2409.02060): queries and keys are normed over all heads together; weights that do not sum to one."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.tensors import FUSED, PER_EXPERT
from workers.spec import ModelSpec


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    return {
        "ffn_size": config.get("intermediate_size", int),
        "n_experts": config.get("num_experts", int),
        "top_k": config.get("num_experts_per_tok", int),
        "gate_normalize": config.get("norm_topk_prob", bool, False),
        "sliding_window": None,
        "qk_norm": "row",
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "intermediate_size": spec.ffn_size,
        "num_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.gate_normalize,
    }


def _typical(spec: ModelSpec) -> dict[str, Any]:
    return {"qk_norm": "row", "gate_normalize": False}


OLMOE = Family(
    "olmoe", "OlmoeForCausalLM", (PER_EXPERT, FUSED), _read, _write, _typical, norm_eps=1e-5, max_context=4096
)
