"""Qwen2-MoE (arXiv 2407.10671; Qwen1.5-MoE too): a shared expert with a gate of its own, biases of q, k and v."""

from __future__ import annotations

from typing import Any

from workers.errors import CheckpointError
from workers.families.config import Config
from workers.families.family import Family
from workers.families.qwen import read_experts, read_window, write_experts, write_window
from workers.families.tensors import FUSED, PER_EXPERT
from workers.spec import ModelSpec

_KINDS = ("full_attention", "sliding_attention")


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    window = read_window(config)
    return read_experts(config, n_layers) | {
        "sliding_window": window,
        "full_layers": _full_layers(config, n_layers, window),
        "qkv_bias": config.get("qkv_bias", bool, True),
        "shared_ffn_size": config.get("shared_expert_intermediate_size", int),
        "shared_gate": True,
    }


def _full_layers(config: Config, n_layers: int, window: int | None) -> frozenset[int]:
    """The layers without the window: those that `layer_types` names, else every other one and those after a limit."""
    config.read.add("layer_types")
    kinds, limit = config.values.get("layer_types"), config.get("max_window_layers", int, 28)
    if kinds is None:
        kinds = [_KINDS[window is not None and layer % 2 == 0 and layer < limit] for layer in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(kinds) <= set(_KINDS):
        raise CheckpointError(f"{config.path}: `layer_types` is {kinds!r}, not {n_layers} of {', '.join(_KINDS)}")
    if window is None and _KINDS[1] in kinds:
        raise CheckpointError(f"{config.path}: `layer_types` has {_KINDS[1]!r}, but `use_sliding_window` is not true")
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == _KINDS[0]) if window else frozenset()


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_experts(spec) | write_window(spec) | {
        "layer_types": [_KINDS[spec.window(layer) is not None] for layer in range(spec.n_layers)],
        "qkv_bias": spec.qkv_bias,
        "shared_expert_intermediate_size": spec.shared_ffn_size,
    }  # fmt: skip


def _typical(spec: ModelSpec) -> dict[str, Any]:
    return {"gate_normalize": False, "qkv_bias": True, "shared_ffn_size": 2 * spec.ffn_size, "shared_gate": True}


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", (PER_EXPERT, FUSED), _read, _write, _typical, max_context=32768)
