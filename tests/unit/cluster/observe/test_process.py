"""Catches a process that says nothing of its GPU, or says percent for a ratio."""

from __future__ import annotations

from cluster.observe.process import ProcessReadings
from cluster.observe.series import process as series

SAID = {"device": "cuda:3", "gpu": "H100", "gpu_total_bytes": 80, "gpu_used_bytes": 60, "gpu_own_bytes": 50}


def of_gpu(said: dict[str, object]) -> dict[object, tuple[object, tuple[str, ...]]]:
    readings = ProcessReadings("expert", lambda: 1, lambda: said)()
    return {each.series: (each.value, each.labels) for each in readings if "gpu" in each.series.name}


def test_memory_and_use_of_the_gpu_of_a_process() -> None:
    labels = ("cuda:3",)
    memory: dict[object, object] = {series.GPU_MEMORY: (80.0, labels), series.GPU_USED: (60.0, labels)}
    assert of_gpu(SAID | {"gpu_percent": 25}) == memory | {series.GPU_UTILIZATION: (0.25, labels)}
    assert of_gpu(dict(SAID)) == memory, "NVML does not say how busy it is"
    assert of_gpu({"device": "cpu"}) == of_gpu({}) == {}
