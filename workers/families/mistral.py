"""Mistral 7B (arXiv 2310.06825): a Llama whose tokens attend to a window."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.llama import read_dense, typical_dense
from workers.families.tensors import Layout
from workers.spec import ModelSpec


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    window = config.find("sliding_window", int) if config.has("sliding_window") else 4096
    return read_dense(config, n_layers) | {"sliding_window": window}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"intermediate_size": spec.dense_ffn_size, "sliding_window": spec.sliding_window}


MISTRAL = Family("mistral", "MistralForCausalLM", (Layout(),), _read, _write, typical_dense, max_context=131072)
