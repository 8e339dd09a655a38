"""Which kernels a device gets. Asked once, where a model or a shard is built."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from workers.kernels.cpu.library import usable
from workers.kernels.cpu.ops import CpuOps
from workers.kernels.ops import Ops
from workers.kernels.torch.ops import TorchOps


def ops_for(device: torch.device | str, dtype: torch.dtype) -> Ops:
    """The fastest operations there are for rows of `dtype` on `device`."""
    device = torch.device(device)
    if device.type == "cpu" and dtype is torch.float32 and usable():
        return CpuOps()
    if device.type == "cuda" and dtype.itemsize == 2 and find_spec("triton") is not None:
        from workers.kernels.cuda.ops import CudaOps

        return CudaOps(device, dtype)
    return TorchOps(device, dtype)
