"""How large things are: the KV pool and the longest sequence that a configuration gives a model."""

from __future__ import annotations

import torch

from cluster.config import Config
from cluster.errors import StartError
from workers.model.kv_cache import bytes_per_block
from workers.spec import ModelSpec


def pool_blocks(config: Config, spec: ModelSpec, dtype: torch.dtype) -> int:
    """How many KV blocks `kv_cache_mb` holds. Raises StartError when it is not even one."""
    block_bytes = bytes_per_block(spec, config.block_size, dtype)
    n_blocks = config.kv_cache_mb * 2**20 // block_bytes
    if n_blocks < 1:
        raise StartError(
            f"kv_cache_mb is {config.kv_cache_mb}, but one block of {config.block_size} tokens takes "
            f"{block_bytes / 2**20:.1f} MiB of this model"
        )
    return n_blocks


def context_limit(config: Config, spec: ModelSpec, n_blocks: int) -> int:
    """The longest prompt + answer, in tokens: what the model, the configuration and the pool all allow.

    The last token of an answer is never computed, so it needs no room in the pool.
    """
    allowed = min(spec.max_context, n_blocks * config.block_size + 1)
    return min(allowed, config.max_context) if config.max_context else allowed
