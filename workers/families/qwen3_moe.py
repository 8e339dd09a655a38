"""Qwen3-MoE (arXiv 2505.09388): queries and keys are normed head by head; no shared expert, no biases."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.qwen import read_experts, read_window, write_experts, write_window
from workers.families.tensors import FUSED, PER_EXPERT
from workers.spec import ModelSpec


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    return read_experts(config, n_layers) | {"sliding_window": read_window(config), "qk_norm": "head"}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_experts(spec) | write_window(spec)


def _typical(spec: ModelSpec) -> dict[str, Any]:
    return {"qk_norm": "head"}


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", (PER_EXPERT, FUSED), _read, _write, _typical, max_context=32768)
