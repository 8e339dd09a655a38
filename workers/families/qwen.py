"""What the mixtures of Qwen share: small experts under keys of their own, dense layers where the configuration says."""

from __future__ import annotations

from typing import Any

from workers.errors import CheckpointError
from workers.families.config import Config
from workers.spec import ModelSpec


def read_experts(config: Config, n_layers: int) -> dict[str, Any]:
    """The gate takes the softmax over all experts; `norm_topk_prob` makes the chosen ones' weights sum to one."""
    step = config.get("decoder_sparse_step", int, 1)
    if step < 1:
        raise CheckpointError(f"{config.path}: `decoder_sparse_step` is {step}, not positive")
    only_dense = config.integers("mlp_only_layers")
    dense = frozenset(layer for layer in range(n_layers) if layer in only_dense or (layer + 1) % step)
    config.skip("intermediate_size")  # where all layers have experts it means nothing
    experts = "num_experts" if config.has("num_experts") else "num_local_experts"  # what newer files say
    return {
        "ffn_size": config.get("moe_intermediate_size", int),
        "n_experts": config.get(experts, int),
        "top_k": config.get("num_experts_per_tok", int),
        "gate_normalize": config.get("norm_topk_prob", bool, False),
        "dense_layers": dense,
        "dense_ffn_size": config.get("intermediate_size", int) if dense else 0,
    }


def write_experts(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    return {
        "moe_intermediate_size": spec.ffn_size,
        "num_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.gate_normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(spec.dense_layers),
        "intermediate_size": spec.dense_ffn_size or spec.ffn_size,
    }


def read_window(config: Config) -> int | None:
    """`sliding_window`, of which `use_sliding_window` says whether it means anything."""
    used = config.get("use_sliding_window", bool, False)
    window = config.get("sliding_window", int, 4096) if used else None
    config.skip("sliding_window")
    return window


def write_window(spec: ModelSpec) -> dict[str, Any]:
    """The inverse of `read_window`."""
    return {"use_sliding_window": spec.sliding_window is not None, "sliding_window": spec.sliding_window}
