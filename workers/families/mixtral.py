"""Mixtral (arXiv 2401.04088): the weights of a token's experts are the softmax over their logits alone."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.tensors import FUSED, Layout
from workers.spec import ModelSpec

_BLOCK = "block_sparse_moe."


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    return {
        "ffn_size": config.get("intermediate_size", int),
        "n_experts": config.get("num_local_experts", int),
        "top_k": config.get("num_experts_per_tok", int),
        "sliding_window": config.find("sliding_window", int),
    }


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        "intermediate_size": spec.ffn_size,
        "num_local_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "sliding_window": spec.sliding_window,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layouts=(
        Layout(
            gate=_BLOCK + "gate.weight",
            expert=(_BLOCK + "experts.{}.w1.weight", _BLOCK + "experts.{}.w2.weight", _BLOCK + "experts.{}.w3.weight"),
        ),
        FUSED,
    ),
    read=_read,
    write=_write,
    typical=lambda spec: {},
    rope_theta=1e6,
    norm_eps=1e-5,
)
