"""Device memory that processes of one host share: one allocates and says its name, the others map it."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.errors import DeviceError
from workers.transport.device.host import HostLaunch, OwnHostMemory, PeerHostMemory
from workers.transport.device.launch import CudaLaunch, Launch


class Memory(Protocol):
    """Bytes that processes share."""

    bytes: Tensor  # uint8

    def close(self) -> None: ...


class Own(Memory, Protocol):
    """Those that this process allocated."""

    name: str  # what a peer needs to map them


def own(n_bytes: int, device: torch.device) -> Own:
    """Zeroed memory of `device` to share. Raises DeviceError."""
    return OwnMemory(n_bytes, device) if device.type == "cuda" else OwnHostMemory(n_bytes)


def peer(name: str, n_bytes: int, device: torch.device) -> Memory:
    """Memory that a peer allocated, mapped for `device`. Raises DeviceError."""
    return PeerMemory(name, n_bytes, device) if device.type == "cuda" else PeerHostMemory(name, n_bytes)


def launch(device: torch.device, limit_s: float) -> Launch:
    """The exchange's kernels on `device`."""
    return CudaLaunch(limit_s) if device.type == "cuda" else HostLaunch(limit_s)


_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE


class _Raw:
    """Memory at an address, as torch takes it from other libraries."""

    def __init__(self, address: int, n_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class OwnMemory:
    """Zeroed memory of this process on one GPU, apart from torch's: what is shared is this and nothing around it."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        """Raises DeviceError when there is no room, or memory cannot be shared here."""
        torch.cuda.set_device(device)
        torch.cuda.current_stream(device)  # CUDA's context is torch's
        runtime = _runtime()
        self._address = int(_checked(runtime.cudaMalloc(n_bytes)))
        self.bytes = torch.as_tensor(_Raw(self._address, n_bytes), device=device)
        self.bytes.zero_()
        torch.cuda.synchronize(device)
        handle = _checked(runtime.cudaIpcGetMemHandle(self._address))
        #: What a peer needs to map it.
        content = ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex()
        self.name = f"{content} {torch.cuda.get_device_properties(device).uuid}"

    def close(self) -> None:
        """Free it. Nothing uses it any more."""
        if self._address:
            _checked(_runtime().cudaFree(self._address))
            self._address = 0


class PeerMemory:
    """Memory of another process, on this process's GPU or one that it reaches directly."""

    def __init__(self, name: str, n_bytes: int, device: torch.device) -> None:
        """`name` as the owner says it; `device`: that of this process. Raises DeviceError saying why not."""
        handle_hex, uuid = name.split()
        owner = _device_of(uuid)
        if owner is None:
            raise DeviceError(f"the GPU {uuid} is not among those of this process")
        if owner != device and not torch.cuda.can_device_access_peer(device, owner):
            raise DeviceError(f"{device} does not reach the memory of {owner} directly")
        runtime = _runtime()
        torch.cuda.set_device(device)  # a mapping belongs to the device that is current
        torch.cuda.current_stream(device).synchronize()
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), bytes.fromhex(handle_hex)[:_HANDLE_BYTES], _HANDLE_BYTES)
        flags = runtime.cudaIpcMemLazyEnablePeerAccess
        self._address = int(_checked(runtime.cudaIpcOpenMemHandle(handle, flags)))
        self.bytes: Tensor = torch.as_tensor(_Raw(self._address, n_bytes), device=owner)
        if self.bytes.data_ptr() != self._address:  # torch made a copy: it takes the memory for another device's
            raise DeviceError(f"memory of {owner} is not mapped as such on {device}")

    def close(self) -> None:
        """Unmap it. Nothing uses it any more."""
        if self._address:
            _checked(_runtime().cudaIpcCloseMemHandle(self._address))
            self._address = 0


def _device_of(uuid: str) -> torch.device | None:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    return None


def _runtime() -> Any:
    from cuda.bindings import runtime  # comes with every torch that has CUDA

    return runtime


def _checked(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise DeviceError(f"CUDA cannot share memory between processes here: {error.name}")
    return values[0] if values else None
