"""How large things are: the KV pool and the longest sequence that a configuration gives a model."""

from __future__ import annotations

import torch

from cluster.config import Config
from cluster.errors import StartError
from workers.checkpoint import Checkpoint
from workers.device import compute_dtype
from workers.kernels.select import formats_for
from workers.model.kv_cache import bytes_per_block
from workers.spec import ModelSpec
from workers.weights import FORMATS, WeightFormat, kept_in

CPU_KV_MIB = 512  # of a router without a GPU, unless configured


def pool_blocks(config: Config, spec: ModelSpec, dtype: torch.dtype) -> int:
    """How many KV blocks `kv_cache_mb` holds. Raises StartError when it is not even one."""
    block_bytes = bytes_per_block(spec, config.block_size, dtype)
    n_blocks = (config.kv_cache_mb or CPU_KV_MIB) * 2**20 // block_bytes
    if n_blocks < 1:
        raise StartError(
            f"kv_cache_mb is {config.kv_cache_mb}, but one block of {config.block_size} tokens takes "
            f"{block_bytes / 2**20:.1f} MiB of this model"
        )
    return n_blocks


def cluster_dtype(config: Config, spec: ModelSpec) -> torch.dtype:
    """What routers and expert workers compute in; their devices are settled."""
    experts = [config.expert_device] if config.expert_workers else []
    return compute_dtype(config.dtype, spec.dtype, config.router_device, *experts)


def step_bytes(config: Config, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that a step takes on a router's device at most: activations of its rows, logits of its sequences."""
    rows = config.max_batch_tokens + config.max_sequences
    attention, experts = spec.n_heads * spec.head_dim, spec.top_k * (spec.hidden_size + 3 * spec.ffn_size)
    per_row = 4 * (attention + spec.hidden_size) + experts
    return rows * per_row * dtype.itemsize + 3 * config.max_sequences * spec.vocab_size * 4


def context_limit(config: Config, spec: ModelSpec, n_blocks: int) -> int:
    """The longest prompt + answer, in tokens: what the model, the configuration and the pool all allow.

    The last token of an answer is never computed, so it needs no room in the pool.
    """
    allowed = min(spec.max_context, n_blocks * config.block_size + 1)
    return min(allowed, config.max_context) if config.max_context else allowed


def expert_format(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu", name: str = "auto"
) -> WeightFormat:
    """What experts' weights are kept in by a worker that computes in `dtype` on `device`; name: `--expert-dtype`.

    Raises StartError where it has no kernels for that.
    """
    formats = formats_for(device, dtype)
    if name == "auto":
        return kept_in(checkpoint.expert_format, formats, dtype)
    if FORMATS[name] not in formats:
        device, can = torch.device(device).type, ", ".join(each for each in FORMATS if FORMATS[each] in formats)
        raise StartError(
            f"--expert-dtype {name}: experts that compute in {str(dtype).removeprefix('torch.')} on a {device} device "
            f"keep weights in {can}; name one of them, or leave it at auto"
        )
    return FORMATS[name]


def expert_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu", name: str = "auto"
) -> int:
    """Bytes of one expert in such a worker."""
    spec = checkpoint.spec
    return expert_format(checkpoint, dtype, device, name).expert_bytes(spec.hidden_size, spec.ffn_size)
