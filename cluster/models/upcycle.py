"""Upcycling: a dense Llama becomes a Mixtral whose experts are copies of its FFN, with the answers of the dense model.

The weights of a token's experts sum to one, so the mixture of equal experts is the FFN itself, whatever the gate says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.models.dense import DenseSource, from_directory
from cluster.models.gates import fit_gates
from cluster.models.gguf_source import from_gguf
from cluster.models.writer import building, write_json, write_weights
from workers.families.registry import config_of, spec_of, tensor_names
from workers.families.tensors import Shape
from workers.spec import ModelSpec

Progress = Callable[[str, float], None]  # (what is being done, fraction of it done)

_EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight")
_FFN = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def write_upcycled(
    source: Path, dest: Path, *, n_experts: int = 8, top_k: int = 2, progress: Progress = lambda what, fraction: None
) -> None:
    """Write a Mixtral with `n_experts` copies of each FFN of the dense checkpoint `source` to `dest`.

    `source` is a Hugging Face directory or a GGUF file, `dest` must not exist or be empty. Tensors keep their dtype
    (quantized ones become bfloat16). Raises CheckpointError.
    """
    progress("reading the dense model", 0.0)
    dense = _open(source)
    progress("reading the dense model", 1.0)
    spec = mixture_of(dense.spec, n_experts, top_k)
    spec_of(config_of(spec), dense.origin)  # checks the sizes
    names, gates = tensor_names(spec), dict[str, Tensor]()
    with building(dest) as directory, torch.inference_mode():
        for layer, gate_ED in enumerate(fit_gates(spec, dense)):
            gates[names.layer(layer)["gate_ED"][0]] = gate_ED
            progress("fitting the gates", (layer + 1) / spec.n_layers)
        read = lru_cache(maxsize=len(_FFN))(dense.read)  # all copies of an FFN are written in a row

        def make(name: str, shape: Shape) -> Tensor:
            expert = _EXPERT.fullmatch(name)
            if expert:
                return read(f"{expert[1]}.mlp.{_FFN[expert[2]]}.weight", shape)
            return gates[name] if name in gates else dense.read(name, shape)

        write_weights(
            directory,
            list(names.every()),
            spec.dtype,
            make,
            progress=lambda fraction: progress("writing the experts", fraction),
        )
        write_json(directory / "config.json", config_of(spec))
        dense.carry(directory)


def mixture_of(dense: ModelSpec, n_experts: int, top_k: int) -> ModelSpec:
    """The Mixtral whose experts are each as large as the FFN of the `dense` model."""
    return replace(
        dense, family="mixtral", ffn_size=dense.dense_ffn_size, n_experts=n_experts, top_k=top_k,
        dense_layers=frozenset(), dense_ffn_size=0,
    )  # fmt: skip


def _open(source: Path) -> DenseSource:
    if source.is_dir():
        return from_directory(source)
    if source.is_file():
        return from_gguf(source)
    raise CheckpointError(f"{source}: no such directory or GGUF file")
