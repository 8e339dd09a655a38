"""A Hugging Face Mixtral directory: exactly the tensors asked for, and nothing else is read.

Shape legend: V vocabulary, D hidden size, E experts, F expert FFN size; projections are [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.spec import ModelSpec, Shape, read_json
from workers.tensor_file import TensorFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The dense half of one layer."""

    input_norm_D: Tensor
    q: Tensor  # [n_heads * head_dim, D]
    k: Tensor  # [n_kv_heads * head_dim, D]
    v: Tensor  # [n_kv_heads * head_dim, D]
    o: Tensor  # [D, n_heads * head_dim]
    post_norm_D: Tensor
    gate_ED: Tensor


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """All a router needs: everything but the experts."""

    embed_VD: Tensor
    norm_D: Tensor
    head_VD: Tensor  # the same object as `embed_VD` when they are tied
    layers: tuple[DenseLayer, ...]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: y = w2 (silu(w1 x) * (w3 x))."""

    w1_FD: Tensor
    w2_DF: Tensor
    w3_FD: Tensor


class Checkpoint:
    """A checkpoint directory, opened: `config.json` and the headers are read, no tensor is.

    Raises CheckpointError when the directory holds no Mixtral in safetensors. `verify` before serving finds the rest.
    Not thread-safe.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such directory")
        spec = ModelSpec.from_config(self.path)
        self.bytes_read = 0  # of tensor data; headers and JSON files are not counted
        self._files: dict[str, TensorFile] = {}
        self._index = self._read_index()
        names = spec.tensor_names
        self._fused = self._holds(names.fused_experts(0)["gate_up"][0])
        # The files know their dtype better than `config.json`, in which it is optional.
        self.spec = dataclasses.replace(spec, dtype=self._file(names.embed()[0]).check(*names.embed()))

    def verify(self) -> None:
        """Check by the headers alone that every tensor of the model is there, whole and of the right shape.

        Raises one CheckpointError: the first thing that is wrong, with file and tensor.
        """
        for name, shape in self._expected():
            self._file(name).check(name, shape)

    def dense(self, dtype: torch.dtype) -> DenseWeights:
        """Read everything but the experts, as `dtype`."""
        names = self.spec.tensor_names
        embed_VD = self._read(*names.embed(), dtype)
        return DenseWeights(
            embed_VD=embed_VD,
            norm_D=self._read(*names.norm(), dtype),
            head_VD=embed_VD if self.spec.tie_embeddings else self._read(*names.head(), dtype),
            layers=tuple(
                DenseLayer(
                    **{
                        field: self._read(name, shape, dtype)
                        for field, (name, shape) in names.layer(layer, fused=self._fused).items()
                    }
                )
                for layer in range(self.spec.n_layers)
            ),
        )

    def expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """Read one expert, as `dtype`."""
        names = self.spec.tensor_names
        if not self._fused:
            return ExpertWeights(
                **{
                    field: self._read(name, shape, dtype)
                    for field, (name, shape) in names.expert(layer, expert).items()
                }
            )
        fused, ffn, hidden = names.fused_experts(layer), self.spec.ffn_size, self.spec.hidden_size
        gate_up, down = fused["gate_up"], fused["down"]
        size = ffn * hidden
        return ExpertWeights(
            w1_FD=self._read(*gate_up, dtype, (2 * expert) * size, (ffn, hidden)),
            w2_DF=self._read(*down, dtype, expert * size, (hidden, ffn)),
            w3_FD=self._read(*gate_up, dtype, (2 * expert + 1) * size, (ffn, hidden)),
        )

    def _read(self, name: str, shape: Shape, dtype: torch.dtype, first: int = 0, part: Shape | None = None) -> Tensor:
        """Tensor `name`, which must have `shape`, or `part` of it from element `first` on."""
        file = self._file(name)
        file.check(name, shape)
        tensor = file.read(name, first, part or shape)
        self.bytes_read += tensor.nbytes
        return tensor.to(dtype)

    def _expected(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor the model needs, layer by layer."""
        names = self.spec.tensor_names
        yield names.embed()
        for layer in range(self.spec.n_layers):
            yield from names.layer(layer, fused=self._fused).values()
            if self._fused:
                yield from names.fused_experts(layer).values()
            else:
                for expert in range(self.spec.n_experts):
                    yield from names.expert(layer, expert).values()
        yield names.norm()
        if not self.spec.tie_embeddings:
            yield names.head()

    def _read_index(self) -> dict[str, str] | None:
        """Tensor name -> file name of a sharded checkpoint; None when all is in one file."""
        if (self.path / _SINGLE).is_file():
            return None
        index_path = self.path / _INDEX
        if not index_path.is_file():
            raise self._no_weights()
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: has no `weight_map` object")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index_path}: tensor {name} is said to be in {file!r}, not a file name")
        return weight_map

    def _no_weights(self) -> CheckpointError:
        pickle = next((found for pattern in _PICKLES for found in sorted(self.path.glob(pattern))), None)
        if pickle is not None:
            return CheckpointError(
                f"{pickle}: a pickle checkpoint can run code when it is loaded; only safetensors are read: convert it"
            )
        return CheckpointError(f"{self.path / _SINGLE}: no such file, nor {_INDEX}; only safetensors are read")

    def _holds(self, name: str) -> bool:
        return name in (self._file(name).tensors if self._index is None else self._index)

    def _file(self, name: str) -> TensorFile:
        """The file that holds tensor `name`, its header read once."""
        if self._index is None:
            file = _SINGLE
        elif name in self._index:
            file = self._index[name]
        else:
            raise CheckpointError(f"{self.path / _INDEX}: tensor {name} is missing")
        if file not in self._files:
            self._files[file] = TensorFile.open(self.path / file)
        return self._files[file]
