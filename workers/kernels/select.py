"""Which kernels a device gets, and what weights they take. Asked once, where a model or a shard is built."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from workers.kernels.cpu.kernel import kinds
from workers.kernels.cpu.library import usable
from workers.kernels.cpu.ops import CpuOps
from workers.kernels.ops import Ops
from workers.kernels.torch.ops import TorchOps
from workers.weights import FORMATS, WeightFormat, format_of

_MADE_ON_GPUS = frozenset(each for each in FORMATS.values() if not each.file_dtype)


def ops_for(device: torch.device | str, dtype: torch.dtype) -> Ops:
    """The fastest operations there are for rows of `dtype` on `device`."""
    device = torch.device(device)
    if device.type == "cpu" and dtype is torch.float32 and usable():
        return CpuOps()
    if device.type == "cuda" and dtype.itemsize == 2 and find_spec("triton") is not None:
        from workers.kernels.cuda.ops import CudaOps

        return CudaOps(device, dtype)
    return TorchOps(device, dtype)


def formats_for(device: torch.device | str, dtype: torch.dtype) -> frozenset[WeightFormat]:
    """What weights may be kept in there, for rows of `dtype`: that, and what its kernels read as it is. This process
    need not have the device."""
    device, others = torch.device(device), frozenset[WeightFormat]()
    if device.type == "cpu" and dtype is torch.float32 and usable():
        others = frozenset(each for each in FORMATS.values() if each.dtype in kinds() and not each.scaled)
    elif device.type == "cuda" and dtype.itemsize == 2:
        others = _MADE_ON_GPUS
    return others | {format_of(dtype)}
