"""The safetensors of a checkpoint directory, in one file or sharded with an index, as one table of tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from workers.device_reader import DeviceReader
from workers.errors import CheckpointError
from workers.families.config import read_json
from workers.families.tensors import Shape
from workers.tensor_file import TensorFile
from workers.weights import WeightFormat

_CPU = torch.device("cpu")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorStore:
    """Tensors by name, read to one device. Opening reads the index alone; a file's header is read when one of its
    tensors is asked for.

    Raises CheckpointError, naming file and tensor. Not thread-safe.
    """

    def __init__(self, directory: Path, device: torch.device = _CPU, finite: bool = False) -> None:
        """`finite`: refuse tensors with NaN or infinite values when they are read."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        self.directory = directory
        self.device = device
        self._reader = DeviceReader(device) if device.type == "cuda" else None
        self.bytes_read = 0  # of tensor data; headers and the index are not counted
        self._finite = finite
        self._files: dict[str, TensorFile] = {}
        self._index = self._read_index()

    def __contains__(self, name: str) -> bool:
        return name in (self._file(name).tensors if self._index is None else self._index)

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._file(_SINGLE).tensors if self._index is None else self._index)

    def check(self, name: str, shape: Shape) -> WeightFormat:
        """What a tensor is stored as that is there, whole, of `shape` and of a supported dtype; headers alone."""
        return self._file(name).check(name, shape)

    def read(
        self, name: str, shape: Shape, dtype: torch.dtype | None = None, *, first: int = 0, part: Shape | None = None
    ) -> Tensor:
        """Tensor `name`, which must have `shape`, or `part` of it from element `first` on. No `dtype`: that on disk."""
        file = self._file(name)
        file.check(name, shape)
        tensor = file.read(name, first, part or shape, self._reader)
        self.bytes_read += tensor.nbytes
        if self._finite and not _is_finite(tensor):
            raise CheckpointError(
                f"{file.path}: tensor {name} has NaN or infinite values; --no-check-weights serves it all the same"
            )
        return tensor if dtype is None else tensor.to(dtype)

    def _read_index(self) -> dict[str, str] | None:
        """Tensor name -> file name of a sharded checkpoint; None when all is in one file."""
        if (self.directory / _SINGLE).is_file():
            return None
        index_path = self.directory / _INDEX
        if not index_path.is_file():
            raise self._no_weights()
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: has no `weight_map` object")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index_path}: tensor {name} is said to be in {file!r}, not a safetensors file")
        return weight_map

    def _no_weights(self) -> CheckpointError:
        pickle = next((found for pattern in _PICKLES for found in sorted(self.directory.glob(pattern))), None)
        if pickle is not None:
            return CheckpointError(
                f"{pickle}: a pickle checkpoint can run code when it is loaded; only safetensors are read: convert it"
            )
        return CheckpointError(f"{self.directory / _SINGLE}: no such file, nor {_INDEX}; only safetensors are read")

    def _file(self, name: str) -> TensorFile:
        """The file that holds tensor `name`, its header read once."""
        if self._index is None:
            file = _SINGLE
        elif name in self._index:
            file = self._index[name]
        else:
            raise CheckpointError(f"{self.directory / _INDEX}: tensor {name} is missing")
        if file not in self._files:
            self._files[file] = TensorFile.open(self.directory / file)
        return self._files[file]


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. A sum takes no memory; only absurd values make it infinite themselves."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
