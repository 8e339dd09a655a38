"""An engine from a checkpoint directory: with its experts elsewhere, or all of them in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.config import Config
from cluster.router.engine import Engine
from cluster.router.grammar import GrammarCompiler
from cluster.router.memory import check_memory
from cluster.router.sizing import pool_blocks
from workers.checkpoint import Checkpoint
from workers.kernels.linear import kept
from workers.kernels.memory import give_back
from workers.model.decoder import Decoder
from workers.model.experts import Experts
from workers.model.kv_cache import KVCache, bytes_per_block
from workers.shard import load_shard
from workers.spec import compute_dtype

_WORKING_BYTES = 256 * 2**20  # activations and logits of a step, code


def build_engine(config: Config, path: str | Path, experts: Experts | None = None) -> Engine:
    """Load the dense half of the checkpoint at `path`, and every expert too unless `experts` says where they are.

    Raises CheckpointError when a tensor is missing or wrong, StartError when memory does not suffice; both before
    anything is loaded.
    """
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    spec, dtype = checkpoint.spec, compute_dtype(config.dtype)
    n_blocks = pool_blocks(config, spec, dtype)
    wanted = {
        "dense weights": dense_bytes(checkpoint, dtype),
        "KV cache": n_blocks * bytes_per_block(spec, config.block_size, dtype),
        "work": _WORKING_BYTES,
    }
    if experts is None:
        wanted["experts"] = expert_bytes(checkpoint, dtype) * len(spec.experts)
    check_memory(wanted)
    dense = checkpoint.dense(dtype, kept(dtype))
    cache = KVCache(spec, n_blocks, config.block_size, dtype)
    if experts is None:
        experts = load_shard(checkpoint, spec.experts, dtype)
    model = Decoder(spec, dense, experts, cache)
    give_back()
    return Engine(model, config, GrammarCompiler(path, spec.vocab_size, spec.eos_ids))


def expert_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of one expert in a worker that computes in `dtype`."""
    stored, spec = checkpoint.expert_dtype, checkpoint.spec
    return 3 * spec.hidden_size * spec.ffn_size * (stored if stored in kept(dtype) else dtype).itemsize


def dense_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the weights, all but the experts, in a router that computes in `dtype`."""
    return checkpoint.dense_bytes(dtype, kept(dtype))
