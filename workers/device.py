"""Devices: which GPUs this machine has, which one a process computes on, and in what dtype."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from workers.ending import end_process
from workers.errors import DeviceError
from workers.weights import FORMATS

_log = logging.getLogger(__name__)

DeviceName = Literal["auto", "cpu", "cuda"]

#: To be in the environment of a process of Ray that computes on a GPU. It sees all of the host's: CUDA IPC and
#: peer-to-peer copies have to name the peer's, which Ray would hide. In the order of NVML, which Ray counts in.
ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


#: What CUDA, its libraries and kernels take of a GPU in each process, and what an allocator rounds up.
CONTEXT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that this process may use."""

    index: int  # N of `cuda:N`
    name: str  # as NVML says it: "NVIDIA H200"
    total_bytes: int
    free_bytes: int  # of all processes, now
    bytes_per_s: int  # what its memory gives by its clock and width
    host: str = ""
    strangers: tuple[int, ...] = ()  # GPUs of the host whose memory it does not reach directly
    capability: tuple[int, int] = (0, 0)  # of its processors: (9, 0) is an H100's; (0, 0): not known


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA will show this process, asked of NVML: CUDA itself would take half a gigabyte of each.

    Empty where torch was built without CUDA, or there is no driver.
    """
    if torch.version.cuda is None:
        return ()
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = _visible()
        return tuple(_gpu(index, handle, handles) for index, handle in enumerate(handles))
    finally:
        pynvml.nvmlShutdown()


def pick(name: str, ray_gpu_ids: Sequence[object] = ()) -> torch.device:
    """The device of a process for which the configuration says `name`, with an index where it is a GPU.

    ray_gpu_ids: what Ray gave the process, of which the first is taken, and is the process's GPU 0 from now on: a
    thread that does not say on which GPU it launches launches there. All others stay in sight, behind it. To be called
    before CUDA is first used. Raises DeviceError when a GPU is asked for and cannot be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    if ray_gpu_ids and torch.version.cuda is not None:
        _put_first(str(ray_gpu_ids[0]))
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if name == "auto":
        return torch.device("cpu")
    reason = f"torch {torch.__version__} was built without it" if torch.version.cuda is None else "it finds no GPU"
    raise DeviceError(f"device cuda: CUDA cannot be used here: {reason}")


def compute_dtype(name: str, stored: torch.dtype, *devices: torch.device | str) -> torch.dtype:
    """What routers and expert workers, which exchange rows, compute in: `name`; for "auto" what the checkpoint is
    `stored` in, unless one of their `devices` is a CPU: float32 then."""
    if name != "auto":
        return FORMATS[name].dtype
    return torch.float32 if any(str(device) == "cpu" for device in devices) else stored


def rows_device(device: torch.device, *ends: str) -> torch.device:
    """Where the rows lie that a process on `device` exchanges collectively: on its GPU if all `ends` are on GPUs."""
    return device if device.type == "cuda" and all(end == "cuda" for end in ends) else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a planner has to know of an expert worker's device; 0: not known."""

    slots: int = 0  # experts that there is room for
    bytes_per_s: int = 0  # what its memory gives: decoding reads every weight that a row needs


def capacity(device: torch.device, share: float, expert_bytes: int, most: int) -> Capacity:
    """Of a worker that may take `share` of its GPU's memory, for `most` experts or fewer; of the host's, which others
    use too, nothing is known."""
    if device.type == "cpu":
        return Capacity()
    gpu = gpus()[device.index]
    room = min(gpu.total_bytes * share, gpu.free_bytes) - CONTEXT_BYTES
    return Capacity(min(most, int(max(0, room)) // expert_bytes), gpu.bytes_per_s)


def describe(device: torch.device) -> dict[str, object]:
    """A process's device for people: its kind; of a GPU its name, memory and use, in bytes and percent."""
    if device.type == "cpu":
        return {"device": "cpu"}
    free, total = torch.cuda.mem_get_info(device)
    said: dict[str, object] = {
        "device": f"cuda:{_shown()[device.index] if _shown() else device.index}",  # as others name it, too
        "gpu": torch.cuda.get_device_name(device),
        "gpu_total_bytes": total,
        "gpu_used_bytes": total - free,
        "gpu_own_bytes": torch.cuda.memory_reserved(device),
    }
    with suppress(Exception):  # NVML's; what it cannot say is left out
        said["gpu_percent"] = torch.cuda.utilization(device)
    return said


def _put_first(gpu_id: str) -> None:
    """Make Ray's `gpu_id`, a number among all GPUs or what CUDA_VISIBLE_DEVICES calls it, the first that CUDA shows."""
    shown = _shown() or [str(index) for index in range(_count())]
    if gpu_id not in shown:
        raise DeviceError(f"Ray gave GPU {gpu_id}, but CUDA_VISIBLE_DEVICES is {','.join(shown)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([gpu_id, *(each for each in shown if each != gpu_id)])


def _shown() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; empty where it says nothing."""
    return [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]


def _count() -> int:
    """How many GPUs NVML finds."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _visible() -> list[object]:
    """NVML's handles of what CUDA_VISIBLE_DEVICES leaves, in its order. CUDA too stops at what it cannot find."""
    import pynvml

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    handles: list[object] = []
    with suppress(pynvml.NVMLError):
        for each in shown.split(","):
            name = each.strip()
            by_index = name.isdecimal()
            handles.append(
                pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
            )
    return handles


def _gpu(index: int, handle: object, handles: Sequence[object]) -> Gpu:
    import pynvml

    def reaches(peer: object) -> bool:
        try:
            status = pynvml.nvmlDeviceGetP2PStatus(handle, peer, pynvml.NVML_P2P_CAPS_INDEX_READ)
        except pynvml.NVMLError:
            return True  # not known; the handshake tries it
        return bool(status == pynvml.NVML_P2P_STATUS_OK)

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    width_bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
    clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    # Two transfers a cycle: NVML states HBM's and GDDR's clocks so that this holds for both.
    bytes_per_s = 2 * clock_mhz * 10**6 * width_bits // 8
    strangers = tuple(other for other, peer in enumerate(handles) if other != index and not reaches(peer))
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(index, name, memory.total, memory.free, bytes_per_s, socket.gethostname(), strangers, (major, minor))


def end_if_lost(device: torch.device, error: BaseException) -> None:
    """End this process if what raised `error` left its GPU of no use: everything that is computed there from then on
    raises too. Whoever waits for it then goes elsewhere, and Ray starts another process."""
    if device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        if "captur" in str(lost):  # another thread captures a step, and that alone is wrong
            return
        reason = str(lost).partition("\n")[0]
        end_process(_log, f"{device} is lost, and this process ends: {reason}", error)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a copy to a GPU is one that nobody waits for."""
    if device.type != "cuda" or not host.is_cpu:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is complete when the tensor's stream has come to it; nobody waits for it here."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def on_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in host memory, complete: copied through pinned memory and waited for once, by one event."""
    copies = tuple(map(to_host, tensors))
    if on_gpu := [tensor for tensor in tensors if tensor.is_cuda]:
        torch.cuda.current_stream(on_gpu[0].device).record_event().synchronize()
    return copies


def host_rows(n_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of the host for rows that go on to `device`: pinned where that is a GPU, so that nobody waits for them."""
    return torch.empty(n_rows, width, dtype=dtype, pin_memory=device.type == "cuda")
