"""A random model of given sizes and any family, for tests and benchmarks: experts differ, so that a wrong one shows."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.models.tokenizer import MIN_VOCABULARY, write_tokenizer
from cluster.models.writer import building, write_json, write_weights
from workers.families.registry import FAMILIES, config_of, spec_of, tensor_names
from workers.families.tensors import PER_EXPERT, Shape, TensorNames
from workers.spec import ModelSpec

SMALL = ModelSpec(
    hidden_size=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_size=96, n_experts=8, top_k=2,
    vocab_size=512, rope_theta=1e6, norm_eps=1e-5, sliding_window=None, tie_embeddings=False, max_context=2048,
    bos_id=1, eos_ids=(2,), dtype=torch.float32,
)  # fmt: skip
"""A model that computes a step in a millisecond; `dataclasses.replace` makes others of it."""


def of_family(spec: ModelSpec, family: str) -> ModelSpec:
    """`spec`, a Mixtral's, with everything that models of another family have beside their sizes. CheckpointError."""
    if family not in FAMILIES:
        raise CheckpointError(f"unknown family {family!r}; supported: {', '.join(FAMILIES)}")
    return replace(spec, family=family, **FAMILIES[family].typical(spec))


def write_random(
    dest: Path, spec: ModelSpec = SMALL, *, seed: int = 0, fused: bool = False, shard_bytes: int | None = None
) -> None:
    """Write a random checkpoint with the sizes and dtype of `spec` to `dest`, which must not exist or be empty.

    The same seed gives the same model in either layout (`fused`) and any sharding. With a vocabulary of at least
    `MIN_VOCABULARY` tokens it has a tokenizer and a chat template, so that the gateway can serve it.
    Raises CheckpointError when the sizes contradict themselves, are not for this family, or it cannot be written.
    """
    config = config_of(spec)
    said = spec_of(config, dest)
    every_field = (field.name for field in dataclasses.fields(spec))
    if lost := [name for name in every_field if getattr(said, name) != getattr(spec, name)]:
        raise CheckpointError(f"{dest}: the config.json of a {spec.family} cannot say this {', '.join(lost)}")
    usual, names = _roles(spec), tensor_names(spec, fused=fused)
    roles: dict[str, str] = {}
    for layer in range(spec.n_layers):
        drawn = usual.layer(layer)
        roles |= {name: drawn[field][0] for field, (name, _) in names.layer(layer).items()}
    parts = {
        names.fused_experts(layer)[field][0]: (layer, fields)
        for layer in spec.sparse_layers if names.layout.fused
        for field, fields in (("gate_up", ("w1_FD", "w3_FD")), ("down", ("w2_DF",)))
    }  # fmt: skip

    def make(name: str, shape: Shape) -> Tensor:
        if name not in parts:
            return _draw(roles.get(name, name), shape, spec, seed)
        layer, fields = parts[name]
        experts = (usual.expert(layer, expert) for expert in range(spec.n_experts))
        return torch.stack([torch.cat([_draw(*expert[field], spec, seed) for field in fields]) for expert in experts])

    with building(dest) as directory:
        write_json(directory / "config.json", config)
        write_weights(directory, list(names.every()), spec.dtype, make, shard_bytes=shard_bytes)
        if spec.vocab_size >= MIN_VOCABULARY:
            write_tokenizer(directory, spec.vocab_size)


def _roles(spec: ModelSpec) -> TensorNames:
    """Names by which tensors are drawn: those of a layout in which each expert has its own."""
    layouts = FAMILIES[spec.family].layouts
    return TensorNames(spec, next((layout for layout in layouts if layout.expert or not layout.fused), PER_EXPERT))


def _draw(role: str, shape: Shape, spec: ModelSpec, seed: int) -> Tensor:
    """Normal numbers, scaled so that activations and logits are of order one at any size.

    Seeded by the tensor's role, not by the order of writing: it is its name where each expert has tensors of its own.
    """
    digest = hashlib.blake2b(f"{seed}/{role}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    noise = torch.randn(shape, generator=generator)
    if "bias" in role:
        return 0.1 * noise
    if len(shape) == 1:  # a norm: near one, but not one, so that a forgotten weight shows
        return 1 + 0.1 * noise
    if role == _roles(spec).embed()[0]:  # tied, it is the head too: between the two scales
        return noise * (1 / math.sqrt(math.sqrt(spec.hidden_size)) if spec.tie_embeddings else 1.0)
    if ".gate." in role:  # twice as steep, so that the two best experts get clearly different weights
        return noise * 2 / math.sqrt(spec.hidden_size)
    return noise / math.sqrt(shape[-1])
