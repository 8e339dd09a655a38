"""What every launch asks: what the card can do, and how the bulk copy engine sees a matrix."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) on a CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one it follows ends (programmatic dependent launch)."""
    return capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """Launch options of kernels that take PDL."""
    return {"PDL": True, "launch_pdl": True} if overlaps(device) else {"PDL": False}


def bulk_copies(weight_ND: Tensor) -> bool:
    """Whether the bulk copy engine can fetch tiles of the matrix: there is one, and rows begin at 16 bytes."""
    able = capability(weight_ND.device) >= (9, 0) or weight_ND.device.type == "cpu"
    return able and weight_ND.shape[-1] * weight_ND.itemsize % 16 == 0 and weight_ND.data_ptr() % 16 == 0


def descriptor(matrix_ND: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of blocks [rows, columns]; what lies outside of the matrix reads as zero."""
    return TensorDescriptor.from_tensor(matrix_ND, [rows, columns])


def power(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(n - 1, 0).bit_length()
