"""An engine from a checkpoint directory: with its experts elsewhere, or all of them in this process."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from cluster.config import Config
from cluster.router.compute import Compute, HostCompute
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.exchange.host_step_compute import HostStepCompute
from cluster.router.grammar import GrammarCompiler
from cluster.router.memory import check_memory, with_kv_cache
from cluster.router.sizing import (
    context_limit,
    expert_bytes,
    expert_format,
    pool_blocks,
    step_bytes,
)
from cluster.routing.recorder import RoutingTrace
from workers.checkpoint import Checkpoint
from workers.device import compute_dtype, pick
from workers.kernels.memory import give_back
from workers.kernels.select import formats_for
from workers.model.decoder import Decoder
from workers.model.experts import Experts
from workers.model.kv_cache import KVCache, bytes_per_block
from workers.shard import load_shard

log = logging.getLogger(__name__)

_WORKING_BYTES = 256 * 2**20  # activations and logits of a step, code


def build_engine(
    config: Config,
    source: str | Path | Checkpoint,
    experts: Experts | None = None,
    trace: RoutingTrace | None = None,
) -> Engine:
    """An engine on the model of `build_model`; what its gates choose goes to `trace`."""
    checkpoint = _checkpoint(config, source)
    model = build_model(config, checkpoint, experts)
    grammars = GrammarCompiler(checkpoint.path, model.spec.vocab_size, model.spec.eos_ids)
    spans = experts.spans if isinstance(experts, Exchange) else None
    return Engine(model, config, grammars, compute_on(model, config, trace), spans)


def build_model(config: Config, source: str | Path | Checkpoint, experts: Experts | None = None) -> Decoder:
    """Load the dense half of the checkpoint `source`, and every expert too unless `experts` says where they are.

    It computes where the checkpoint is read to; that of a directory is the device that the configuration names.
    Raises CheckpointError when a tensor is missing or wrong, StartError when memory does not suffice; both before
    anything is loaded.
    """
    checkpoint = _checkpoint(config, source)
    checkpoint.verify()
    device = checkpoint.device
    spec = checkpoint.spec
    dtype = compute_dtype(config.dtype, spec.dtype, device, config.expert_device if experts is not None else device)
    needed = {"dense weights": dense_bytes(checkpoint, dtype, device)}
    if experts is None:
        needed["experts"] = expert_bytes(checkpoint, dtype, device, config.expert_dtype) * len(spec.experts)
    needed["work"] = step_bytes(config, spec, dtype) if device.type == "cuda" else _WORKING_BYTES
    n_blocks = pool_blocks(with_kv_cache(config, device, needed), spec, dtype)
    needed["KV cache"] = n_blocks * bytes_per_block(spec, config.block_size, dtype)
    check_memory(needed, device)
    dense = checkpoint.dense(dtype, formats_for(device, dtype))
    if experts is None:
        made = expert_format(checkpoint, dtype, device, config.expert_dtype)
        experts = load_shard(checkpoint, spec.experts, dtype, made)
    cache = KVCache(spec, n_blocks, config.block_size, dtype, device)
    model = Decoder(spec, dense, experts, cache)
    give_back()
    return model


def _checkpoint(config: Config, source: str | Path | Checkpoint) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    return Checkpoint(source, pick(config.router_device), finite=config.check_weights)


def compute_on(model: Decoder, config: Config, trace: RoutingTrace | None = None) -> Compute:
    """How the steps of a model are computed: a step ahead where the model and its experts are on a GPU."""
    if device_has_graphs(model):
        from cluster.router.device_compute import DeviceCompute

        limit = context_limit(config, model.spec, model.cache.n_blocks)
        return DeviceCompute(model, config.max_sequences, limit, config.max_batch_tokens, progress, trace)
    if isinstance(model.experts, Exchange) and model.experts.captures_steps:
        if model.cache.device.type == "cpu":
            return HostStepCompute(model, model.experts, trace)
        from cluster.router.exchange.step_compute import ExchangeCompute

        limit = context_limit(config, model.spec, model.cache.n_blocks)
        return ExchangeCompute(
            model, model.experts, config.max_sequences, limit, config.max_batch_tokens, progress, trace
        )
    return HostCompute(model, trace)


def device_has_graphs(model: Decoder) -> bool:
    """Whether decoding steps can be captured whole."""
    return model.cache.device.type == "cuda" and model.ops.exact_rows and model.experts.only_launches


def progress(done: int, total: int) -> None:
    """Says how many of the captures are done."""
    if done in (0, total):
        log.info("decoding steps captured: %d of %d", done, total)


def dense_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> int:
    """Bytes of the weights, all but the experts, in a router that computes in `dtype` on `device`."""
    return checkpoint.dense_bytes(dtype, formats_for(device, dtype))
