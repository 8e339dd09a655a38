"""GPUs as a plan sees them: memory, speeds, and what lies between two of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GpuType:
    """One kind of GPU and the hosts it comes in. Speeds are those of the data sheet; see `READS` and `PRODUCTS`."""

    name: str
    memory_gib: float
    memory_tb_s: float  # of its own memory
    bf16_tflops: float  # dense
    fp8_tflops: float  # dense; of a card without such units those of bf16
    link_gb_s: float  # to another GPU of the host, one direction
    network_gb_s: float  # to another host, one direction, each GPU's share
    per_host: int = 8
    resource: str = "nvidia.com/gpu"  # as Kubernetes calls it

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


# What kernels reach of a data sheet: measured on an H200 (4.25 of 4.8 TB/s, 770 of 989 TFLOP/s) and an H100 (2.99 of
# 3.35 TB/s, 779 TFLOP/s).
READS, PRODUCTS = 0.88, 0.78

GPU_TYPES = {
    gpu.name: gpu
    for gpu in (
        GpuType("b200", 180, 8.0, 2250, 4500, 900, 50),
        GpuType("h200", 141, 4.8, 989, 1979, 450, 50),
        GpuType("h100", 80, 3.35, 989, 1979, 450, 50),
        GpuType("a100-80", 80, 2.04, 312, 312, 300, 25),
        GpuType("a100-40", 40, 1.56, 312, 312, 300, 25),
        GpuType("l40s", 48, 0.864, 362, 733, 25, 12.5),
        GpuType("a10g", 24, 0.6, 125, 125, 12, 3.1, per_host=4),
        GpuType("l4", 24, 0.3, 121, 242, 12, 3.1),
    )
}


def gpu_type(name: str) -> GpuType:
    """The GPU of that name, or the one that a YAML file of `GpuType`'s fields describes. Raises ConfigError."""
    if name.lower() in GPU_TYPES:
        return GPU_TYPES[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--gpu {name}: neither a file nor one of {', '.join(GPU_TYPES)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--gpu {name}: {' '.join(str(error).split())}") from error
    wanted = {field.name: str(field.type) for field in fields(GpuType)}
    if not isinstance(content, dict) or not content.keys() <= wanted.keys():
        raise ConfigError(f"--gpu {name}: expected `field: value` lines with {', '.join(wanted)}")
    for key, value in content.items():
        if wanted[key] == "str":
            fits, kind = isinstance(value, str), "a text"
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            kind = "a positive number"
        if not fits:
            raise ConfigError(f"--gpu {name}: {key}: {value!r} is not {kind}")
    try:
        return GpuType(**content)
    except TypeError as error:
        missing = [key for key in wanted if key not in content and key not in ("per_host", "resource")]
        raise ConfigError(f"--gpu {name}: lacks {', '.join(missing)}") from error
