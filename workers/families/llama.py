"""Llama (arXiv 2307.09288, 2407.21783): dense, so routers serve it alone."""

from __future__ import annotations

from typing import Any

from workers.families.config import Config
from workers.families.family import Family
from workers.families.tensors import Layout
from workers.spec import ModelSpec


def read_dense(config: Config, n_layers: int) -> dict[str, Any]:
    """The fields of a model whose layers have no experts."""
    return {
        "ffn_size": 0,
        "n_experts": 0,
        "top_k": 0,
        "dense_layers": frozenset(range(n_layers)),
        "dense_ffn_size": config.get("intermediate_size", int),
    }


def typical_dense(spec: ModelSpec) -> dict[str, Any]:
    """A token takes as many parameters as in the mixture of the sizes of `spec`."""
    layers = frozenset(range(spec.n_layers))
    return {
        "ffn_size": 0,
        "n_experts": 0,
        "top_k": 0,
        "dense_layers": layers,
        "dense_ffn_size": spec.ffn_size * spec.top_k,
    }


def _read(config: Config, n_layers: int) -> dict[str, Any]:
    config.skip("sliding_window")  # a leftover: transformers' Llama does not look at it
    return read_dense(config, n_layers) | {"sliding_window": None}


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"intermediate_size": spec.dense_ffn_size}


LLAMA = Family("llama", "LlamaForCausalLM", (Layout(),), _read, _write, typical_dense, max_context=2048)
