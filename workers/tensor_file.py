"""One safetensors file: its header, checked, and any run of elements of any tensor in it, read and nothing more.

The format: eight bytes with the header's length (little-endian), the header (a JSON object: name -> dtype, shape,
[begin, end) in the data), the data. Reading goes through `read`, not a mapping: a mapped file would count as resident
memory for as long as one tensor of it lives.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from workers.device_reader import DeviceReader
from workers.errors import CheckpointError
from workers.families.config import unique
from workers.weights import IN_FILES, WeightFormat

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header. `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header fits its length."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header of `path`. Raises CheckpointError when it is not a whole safetensors file."""
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(path, file, size)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, data_start) for name, entry in header.items()}
        before, taken = "the header", data_start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].end, item[1].begin)):
            if info.end > size:
                raise CheckpointError(
                    f"{path}: truncated: tensor {name} ends at byte {info.end}, the file has {size}; fetch it again"
                )
            if info.begin < taken:
                raise CheckpointError(f"{path}: tensor {name} begins at byte {info.begin}, within {before}")
            if info.begin < info.end:
                before, taken = f"tensor {name}", info.end
        return cls(path, tensors)

    def check(self, name: str, shape: tuple[int, ...]) -> WeightFormat:
        """Raise CheckpointError unless `name` is here with `shape`, a supported dtype and all its bytes."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        if info.dtype not in IN_FILES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has unsupported dtype {info.dtype}; supported: {', '.join(IN_FILES)}"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(info.shape)}; config.json makes it {list(shape)}"
            )
        stored = IN_FILES[info.dtype]
        if info.end - info.begin != math.prod(shape) * stored.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {info.end - info.begin} bytes; {info.dtype} {list(shape)} takes "
                f"{math.prod(shape) * stored.dtype.itemsize}"
            )
        return stored

    def read(self, name: str, first: int, shape: tuple[int, ...], to: DeviceReader | None = None) -> Tensor:
        """Elements `first` to `first + prod(shape)` of tensor `name`, as `shape`, in the dtype on disk.

        The tensor owns its memory, on the host or where `to` reads to. `check` comes first. Raises CheckpointError when
        the bytes do not come.
        """
        info = self.tensors[name]
        dtype = IN_FILES[info.dtype].dtype
        begin = info.begin + first * dtype.itemsize
        try:
            if to is not None:
                return to.read(self.path, begin, shape, dtype)
            out = torch.empty(shape, dtype=dtype)
            buffer = out.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                done = 0
                while done < len(buffer):  # one read gives at most 2 GiB
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: the file ends within tensor {name}")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error}") from None
        return out


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and the offset at which the data starts."""
    start = file.read(8)
    if start == _LFS_POINTER[:8]:
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file: the header does not fit {size} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: the header is not sound JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: the header is not a JSON object")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, its types checked: nothing in a downloaded file is trusted."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or begin > end:
        raise CheckpointError(f"{path}: the header's entry for tensor {name} is broken")
    return TensorInfo(dtype, shape, data_start + begin, data_start + end)
