"""What every process says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import psutil

from cluster.observe.exposition import Reading
from cluster.observe.series import process as series


@cache
def version() -> str:
    """Of ExpertMesh; "0" where it is run from a source tree that is not installed."""
    try:
        return version_of("expertmesh")
    except PackageNotFoundError:
        return "0"


class ProcessReadings:
    """A source of readings. `epoch` is that of the placement it works with; `device` is what the process says of the
    GPU that it computes on (`workers.device.describe`)."""

    def __init__(
        self, role: str, epoch: Callable[[], int], device: Callable[[], Mapping[str, object]] | None = None
    ) -> None:
        self._role = role
        self._epoch = epoch
        self._device = device
        self._process = psutil.Process()

    def __call__(self) -> Iterable[Reading]:
        with self._process.oneshot():
            cpu = self._process.cpu_times()
            yield Reading(series.BUILD, 1, (version(), self._role))
            yield Reading(series.EPOCH, self._epoch())
            yield Reading(series.RESIDENT, self._process.memory_info().rss)
            yield Reading(series.CPU, cpu.user + cpu.system)
            yield Reading(series.STARTED, self._process.create_time())
        if self._device is not None:
            yield from _gpu(self._device())


def _gpu(said: Mapping[str, object]) -> Iterable[Reading]:
    if "gpu" not in said:
        return
    labels = (str(said["device"]),)
    yield Reading(series.GPU_MEMORY, float(str(said["gpu_total_bytes"])), labels)
    yield Reading(series.GPU_USED, float(str(said["gpu_used_bytes"])), labels)
    if "gpu_percent" in said:
        yield Reading(series.GPU_UTILIZATION, float(str(said["gpu_percent"])) / 100, labels)
