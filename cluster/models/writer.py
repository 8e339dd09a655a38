"""Writes a checkpoint directory: JSON files, and safetensors one tensor at a time.

Tensors are made when they are written, so that a checkpoint larger than memory can be written. A directory appears
complete or not at all: it is built beside its place and renamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from workers.families.tensors import Shape
from workers.weights import format_of

Entry = tuple[str, Shape]
MakeTensor = Callable[[str, Shape], Tensor]


@contextmanager
def building(dest: Path) -> Iterator[Path]:
    """A fresh directory beside `dest` that takes its place when the block ends without an exception.

    Raises CheckpointError when `dest` exists and is not an empty directory: nothing is overwritten.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise CheckpointError(f"{dest}: exists already and is not an empty directory")
    aside = dest.parent / f".{dest.name}.building-{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(dest)
    except OSError as error:
        raise CheckpointError(f"{dest}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    directory: Path,
    entries: Sequence[Entry],
    dtype: torch.dtype,
    make: MakeTensor,
    *,
    shard_bytes: int | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Write `make(name, shape)` of every entry as `dtype`, in one file or, with `shard_bytes`, in files up to that.

    `progress` hears the fraction that is written.
    """
    shards = _split(entries, dtype, shard_bytes)
    total, done = sum(math.prod(shape) for _, shape in entries), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = shard_bytes is None
        file_name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (directory / file_name).open("wb") as file:
            file.write(_header(shard, dtype))
            for name, shape in shard:
                tensor = make(name, shape)
                if tensor.shape != shape:
                    raise ValueError(f"{name}: made {tuple(tensor.shape)}, declared {shape}")
                file.write(tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
                weight_map[name] = file_name
                done += tensor.numel()
                progress(done / total)
    if shard_bytes is not None:
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map},
        )


def _split(entries: Sequence[Entry], dtype: torch.dtype, shard_bytes: int | None) -> list[list[Entry]]:
    """Entries in order, cut where the next one would not fit; one that is larger than a shard has one of its own."""
    if shard_bytes is None:
        return [list(entries)]
    shards: list[list[Entry]] = []
    room = 0
    for name, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, shape))
        room -= size
    return shards


def _header(entries: Sequence[Entry], dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": format_of(dtype).file_dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text
