"""Catches a process that computes on another GPU than Ray gave it, or in a dtype its peers do not send."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers import device
from workers.device import capacity, compute_dtype, describe, pick
from workers.errors import DeviceError

BF16, F32 = torch.bfloat16, torch.float32


def test_one_dtype_for_both_ends_of_the_exchange() -> None:
    assert compute_dtype("auto", BF16, "cuda", torch.device("cuda", 1)) is BF16
    assert compute_dtype("auto", BF16, torch.device("cuda", 0), "cpu") is F32
    assert compute_dtype("auto", BF16, torch.device("cpu")) is F32
    assert compute_dtype("float16", BF16, "cpu", "cuda") is torch.float16


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick("auto") == pick("cpu", [0]) == torch.device("cpu")
    with pytest.raises(DeviceError, match="CUDA cannot be used here"):
        pick("cuda")
    assert describe(torch.device("cpu")) == {"device": "cpu"}
    assert capacity(torch.device("cpu"), 1.0, 1, 8).slots == 0


@pytest.mark.parametrize(
    ("visible", "given", "then"),
    [
        (None, [2], "2,0,1,3"),
        ("", ["1"], "1,0,2,3"),
        ("4,7", [7], "7,4"),
        ("GPU-a,GPU-b", ["GPU-b"], "GPU-b,GPU-a"),
        ("4,7", [], "4,7"),
    ],
)
def test_the_gpu_is_the_one_that_ray_gave_in_every_thread(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, given: list[object], then: str
) -> None:
    """CUDA's current device is each thread's own, and 0 in a new one: a step loop, or a server's thread, that launched
    on another process's GPU would read memory that is not there."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if visible is None else visible)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pick("auto", given) == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == then


def test_a_gpu_that_is_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(DeviceError, match="Ray gave GPU 5, but CUDA_VISIBLE_DEVICES is 4,7"):
        pick("cuda", [5])


def test_a_build_without_cuda_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.gpus() == ()


def test_rows_of_a_gpu_come_to_the_host_with_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's rows, choices and weights, each waited for by itself, cost three synchronisations."""
    waits: list[str] = []
    event = SimpleNamespace(synchronize=lambda: waits.append("event"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: SimpleNamespace(record_event=lambda: event))
    monkeypatch.setattr(device, "to_host", lambda tensor: f"copy of {tensor.name}")
    on_gpu: list[Any] = [SimpleNamespace(is_cuda=True, device="cuda:0", name=name) for name in ("x", "ids", "weights")]
    assert device.on_host(*on_gpu) == ("copy of x", "copy of ids", "copy of weights")
    assert waits == ["event"]
    monkeypatch.undo()
    here = torch.zeros(2)
    assert device.on_host(here)[0] is here
    assert not device.host_rows(2, 3, torch.float16, torch.device("cpu")).is_pinned()


def test_a_process_whose_gpu_is_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it says that it is ready and fails whatever it is given."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def raises(text: str) -> None:
        def synchronize(where: torch.device) -> None:
            if text:
                raise RuntimeError(text)

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        device.end_if_lost(torch.device("cuda", 0), ValueError("what was computed"))

    raises("")
    raises("operation not permitted when stream is capturing")
    device.end_if_lost(torch.device("cpu"), ValueError())
    assert ended == []
    raises("CUDA error: an illegal memory access was encountered")
    assert ended == [1]
