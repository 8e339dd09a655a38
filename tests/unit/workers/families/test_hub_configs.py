"""The options of well-known checkpoints, as their `config.json` has them: all are taken, none is unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.families.registry import spec_of
from workers.spec import RopeScaling

_BOTH = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
}  # fmt: skip
_SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
_MOE = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

# What each says beside sizes, and what has to come of it.
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mixtral-8x7B-Instruct-v0.1": (
        _MOE | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
                "num_local_experts": 8, "rope_theta": 1000000.0, "sliding_window": None, "router_jitter_noise": 0.0},
        {"rope_theta": 1e6, "sliding_window": None, "n_experts": 8, "gate_normalize": True},
    ),
    "Qwen3-30B-A3B": (
        _MOE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
                "decoder_sparse_step": 1, "head_dim": 128, "max_window_layers": 48, "mlp_only_layers": [],
                "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
                "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False},
        {"ffn_size": 768, "qk_norm": "head", "head_dim": 128, "dense_layers": frozenset(), "gate_normalize": True},
    ),
    "Qwen1.5-MoE-A2.7B": (
        _MOE | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
                "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60,
                "num_experts_per_tok": 4, "qkv_bias": True, "rope_theta": 1000000.0, "use_sliding_window": False,
                "shared_expert_intermediate_size": 5632, "sliding_window": 32768},
        {"shared_ffn_size": 5632, "shared_gate": True, "qkv_bias": True, "gate_normalize": False,
         "sliding_window": None},
    ),
    "OLMoE-1B-7B-0924": (
        _MOE | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
                "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "pad_token_id": 1,
                "rope_scaling": None, "rope_theta": 10000.0},
        {"qk_norm": "row", "gate_normalize": False, "top_k": 8},
    ),
    "granite-3.0-1b-a400m-instruct": (
        _MOE | {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_bias": False,
                "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
                "num_experts_per_tok": 8, "num_local_experts": 32, "pad_token_id": 0, "residual_multiplier": 0.22,
                "rope_scaling": None, "rope_theta": 10000},
        {"scale": 0.015625, "embed_scale": 12.0, "logits_scaling": 6.0, "residual_scale": 0.22},
    ),
    "GLM-4.5-Air": (
        {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
         "first_k_dense_replace": 1, "head_dim": 128, "moe_intermediate_size": 1408, "n_group": 1,
         "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
         "num_nextn_predict_layers": 1, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rope_scaling": None,
         "rope_theta": 1000000, "routed_scaling_factor": 1.0, "topk_group": 1, "use_qk_norm": False},
        {"rotary_dim": 64, "gate_score": "sigmoid", "dense_layers": frozenset({0}), "qk_norm": None, "qkv_bias": True},
    ),
    "Llama-3.1-8B-Instruct": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
         "max_position_embeddings": 131072, "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1,
         "rope_theta": 500000.0, "rope_scaling": {
             "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
             "rope_type": "llama3"}},
        {"rope_scaling": RopeScaling("llama3", 8.0, 8192), "max_context": 131072, "eos_ids": (128001, 128008, 128009)},
    ),
    "Llama-2-13b-chat-hf": (
        {"_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "model_type": "llama", "pad_token_id": 0,
         "max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None},
        {"rope_theta": 1e4, "experts": (), "dense_ffn_size": 14336, "max_context": 4096},
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 10000.0,
         "sliding_window": 4096},
        {"sliding_window": 4096, "experts": ()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_hub_has(name: str, caplog: pytest.LogCaptureFixture) -> None:
    said, expected = CONFIGS[name]
    spec = spec_of(_SIZES | _BOTH | said, Path("config.json"))
    assert {field: getattr(spec, field) for field in expected} == expected
    assert not caplog.records
