"""A Hugging Face checkpoint directory: exactly the tensors asked for, and nothing else is read.

Shape legend: V vocabulary, D hidden size, E experts, F FFN size; projections are [out, in].
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from workers.families.registry import layout_in, read_spec
from workers.families.tensors import Shape, TensorNames, Tensors
from workers.tensor_store import TensorStore
from workers.weights import FORMATS, WeightFormat, kept_in


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert, or another SwiGLU: y = w2 (silu(w1 x) * (w3 x))."""

    w1_FD: Tensor
    w2_DF: Tensor
    w3_FD: Tensor


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The dense half of one layer; what its family does not have is None."""

    input_norm_D: Tensor
    q: Tensor  # [n_heads * head_dim, D]
    k: Tensor  # [n_kv_heads * head_dim, D]
    v: Tensor  # [n_kv_heads * head_dim, D]
    o: Tensor  # [D, n_heads * head_dim]
    post_norm_D: Tensor
    q_bias: Tensor | None = None  # a bias for each row of the projection
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None  # [head_dim], or a weight for each row of the projection
    k_norm: Tensor | None = None
    gate_ED: Tensor | None = None  # None: a layer without experts
    gate_bias_E: Tensor | None = None
    ffn: ExpertWeights | None = None  # of a layer without experts, or shared by all tokens beside the experts
    shared_gate_1D: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """All a router needs: everything but the experts."""

    embed_VD: Tensor
    norm_D: Tensor
    head_VD: Tensor  # the same object as `embed_VD` when they are tied
    layers: tuple[DenseLayer, ...]


class Checkpoint:
    """A checkpoint directory, opened: `config.json`, the index and a header are read, no tensor is.

    Raises CheckpointError when the directory holds no model of a known family in safetensors; `verify` finds the rest
    before anything is served. Not thread-safe.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, finite: bool = False) -> None:
        """`device`: where tensors are read to. `finite`: refuse weights that are NaN or infinite when they are read."""
        self.path = Path(path)
        spec = read_spec(self.path)
        self._store = TensorStore(self.path, torch.device(device), finite)
        # The files know their dtype better than `config.json`, in which it is optional.
        names = TensorNames(spec, layout_in(spec, lambda name: name in self._store))
        self.spec = dataclasses.replace(spec, dtype=self._store.check(*names.embed()).dtype)
        self._names = TensorNames(self.spec, names.layout)

    @property
    def device(self) -> torch.device:
        """Where tensors are read to."""
        return self._store.device

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far; headers and JSON files are not counted."""
        return self._store.bytes_read

    def fingerprint(self, dtype: torch.dtype) -> str:
        """What processes that compute one model in `dtype` agree on, and those of another model do not.

        The sizes, the names of the tensors, and the values of the last norm, which two trainings do not share.
        """
        norm_D = self._store.read(*self._names.norm(), torch.float32).cpu()
        said = repr((self.spec, dtype, self._store.names, norm_D.tolist()))
        sizes = f"{self.spec.n_layers}x{self.spec.n_experts}x{self.spec.hidden_size}"
        return f"{sizes}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def verify(self) -> None:
        """Check by the headers alone that every tensor of the model is there, whole and of the right shape.

        Raises one CheckpointError: the first thing that is wrong, with file and tensor.
        """
        for name, shape in self._names.every():
            self._store.check(name, shape)

    def dense(self, dtype: torch.dtype, keep: Collection[WeightFormat] = ()) -> DenseWeights:
        """Read everything but the experts, as `dtype`; a matrix that is stored as one of `keep` stays as it is."""
        names = self._names
        embed_VD = self._read(*names.embed(), dtype, keep)
        return DenseWeights(
            embed_VD=embed_VD,
            norm_D=self._read(*names.norm(), dtype, keep),
            head_VD=embed_VD if self.spec.tie_embeddings else self._read(*names.head(), dtype, keep),
            layers=tuple(self._layer(layer, dtype, keep) for layer in range(self.spec.n_layers)),
        )

    def dense_bytes(self, dtype: torch.dtype, keep: Collection[WeightFormat] = ()) -> int:
        """Bytes of what `dense` gives, by the headers alone."""
        tensors = self._names.dense()
        return sum(prod(shape) * self._dtype_of(name, shape, dtype, keep).itemsize for name, shape in tensors)

    def stored_bytes(self, routers: int) -> int:
        """Bytes that so many routers and workers with one replica of each expert read in all."""
        spec = self.spec
        expert = self.expert_format.expert_bytes(spec.hidden_size, spec.ffn_size)
        return routers * self.dense_bytes(spec.dtype, FORMATS.values()) + len(spec.experts) * expert

    @property
    def expert_format(self) -> WeightFormat:
        """What every expert is stored as; float32, which holds all of them, where they differ. Reads headers alone."""
        tensors = (tensor for layer in self.spec.sparse_layers for tensor in self._names.experts(layer))
        stored = {self._store.check(*tensor) for tensor in tensors}
        return stored.pop() if len(stored) == 1 else FORMATS["float32"]

    def expert(self, layer: int, expert: int, weight_format: WeightFormat) -> ExpertWeights:
        """Read one expert, as a format that files have."""
        fused, dtype = self._names.fused_experts(layer), weight_format.dtype
        if not fused:
            return ExpertWeights(**self._read_all(self._names.expert(layer, expert), dtype))
        ffn, hidden = self.spec.ffn_size, self.spec.hidden_size
        size = ffn * hidden
        gate_up, down = fused["gate_up"], fused["down"]
        return ExpertWeights(
            w1_FD=self._store.read(*gate_up, dtype, first=2 * expert * size, part=(ffn, hidden)),
            w2_DF=self._store.read(*down, dtype, first=expert * size, part=(hidden, ffn)),
            w3_FD=self._store.read(*gate_up, dtype, first=(2 * expert + 1) * size, part=(ffn, hidden)),
        )

    def _layer(self, layer: int, dtype: torch.dtype, keep: Collection[WeightFormat]) -> DenseLayer:
        ffn = self._read_all(self._names.ffn(layer), dtype, keep)
        tensors = self._read_all(self._names.layer(layer), dtype, keep)
        return DenseLayer(**tensors, ffn=ExpertWeights(**ffn) if ffn else None)

    def _read(self, name: str, shape: Shape, dtype: torch.dtype, keep: Collection[WeightFormat]) -> Tensor:
        return self._store.read(name, shape, self._dtype_of(name, shape, dtype, keep))

    def _dtype_of(self, name: str, shape: Shape, dtype: torch.dtype, keep: Collection[WeightFormat]) -> torch.dtype:
        """What a tensor becomes: matrices may stay what they are, vectors are too small to matter."""
        stored = self._store.check(name, shape)
        return kept_in(stored, keep, dtype).dtype if len(shape) > 1 else dtype

    def _read_all(self, tensors: Tensors, dtype: torch.dtype, keep: Collection[WeightFormat] = ()) -> dict[str, Tensor]:
        return {field: self._read(name, shape, dtype, keep) for field, (name, shape) in tensors.items()}
