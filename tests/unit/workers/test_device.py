"""Catches a process that computes on another GPU than Ray gave it, or in a dtype its peers do not send."""

from __future__ import annotations

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
    assert capacity(torch.device("cpu"), 1.0, 1).slots == 0


@pytest.mark.parametrize(
    ("visible", "given", "index"), [(None, [2], 2), ("", ["1"], 1), ("4,7", [7], 1), ("GPU-a,GPU-b", ["GPU-b"], 1)]
)
def test_the_gpu_is_the_one_that_ray_gave(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, given: list[object], index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick("auto", given) == torch.device("cuda", index)


def test_a_gpu_that_is_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(DeviceError, match="Ray gave GPU 5, but CUDA_VISIBLE_DEVICES is 4,7"):
        pick("cuda", [5])


def test_a_build_without_cuda_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.gpus() == ()
