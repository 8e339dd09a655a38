"""Series that every process has of itself."""

from __future__ import annotations

from typing import Final

from cluster.observe.series.base import Series

BUILD: Final = Series(
    "expertmesh_build_info", "gauge", "", "every process", ("version", "role"), "1: the process runs this version"
)
EPOCH: Final = Series(
    "expertmesh_placement_epoch", "gauge", "", "every process", (), "Number of the placement that it works with"
)
RESIDENT: Final = Series("expertmesh_process_resident_bytes", "gauge", "bytes", "every process", (), "Memory in use")
CPU: Final = Series(
    "expertmesh_process_cpu_seconds_total", "counter", "seconds", "every process", (), "Time on CPUs, user and system"
)
STARTED: Final = Series(
    "expertmesh_process_start_time_seconds", "gauge", "seconds", "every process", (), "Its start, since 1970"
)
GPU_USED: Final = Series(
    "expertmesh_gpu_memory_used_bytes", "gauge", "bytes", "every process", ("gpu",),
    "Memory in use on the GPU of the process, by whoever uses it",
)  # fmt: skip
GPU_MEMORY: Final = Series(
    "expertmesh_gpu_memory_bytes", "gauge", "bytes", "every process", ("gpu",), "Memory of the GPU of the process"
)
GPU_UTILIZATION: Final = Series(
    "expertmesh_gpu_utilization_ratio", "gauge", "ratio", "every process", ("gpu",),
    "Part of the last second in which the GPU of the process computed, for whoever uses it",
)  # fmt: skip
