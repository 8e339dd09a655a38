"""Tensors from files straight into a GPU's memory: several pieces at a time, through pinned memory."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from workers.errors import CheckpointError

_PIECE_BYTES = 16 << 20
_THREADS = 8  # one copies 1 to 3 GB/s out of the page cache


class _Lane(NamedTuple):
    """What a thread needs for one piece: pinned memory, and the stream on which it leaves."""

    pinned: Tensor  # uint8 [_PIECE_BYTES]
    stream: torch.cuda.Stream


class DeviceReader:
    """Reads ranges of files into new tensors on one GPU. Waits for the disk and the copies without holding the GIL.

    One thread calls it. Holds 128 MiB of pinned memory as long as it lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads = ThreadPoolExecutor(_THREADS, "read")
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_THREADS):
            pinned = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._lanes.put(_Lane(pinned, torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]

    def read(self, path: Path, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`prod(shape)` elements of `dtype` from byte `begin` of the file on, on the device and there.

        Raises CheckpointError when the file ends before, OSError.
        """
        out = torch.empty(shape, dtype=dtype, device=self.device)
        # The allocator may give memory that a kernel still reads; the copies run on streams of their own.
        torch.cuda.current_stream(self.device).synchronize()
        flat = out.view(-1).view(torch.uint8)
        n_bytes = math.prod(shape) * dtype.itemsize
        file = os.open(path, os.O_RDONLY)
        try:
            pieces = [
                self._threads.submit(self._piece, file, begin + at, flat[at : at + _PIECE_BYTES])
                for at in range(0, n_bytes, _PIECE_BYTES)
            ]
            whole = [piece.result() for piece in pieces]  # each is waited for: threads read the open file
            if not all(whole):
                raise CheckpointError(f"{path}: the file ends before byte {begin + n_bytes}")
        finally:
            os.close(file)
        return out

    def _piece(self, file: int, begin: int, out: Tensor) -> bool:
        """Read one piece and copy it; False when the file ends within it."""
        lane = self._lanes.get()
        try:
            host = lane.pinned[: len(out)]
            buffer, done = host.numpy().data, 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done:]], begin + done)
                if not count:
                    return False
                done += count
            with torch.cuda.stream(lane.stream):
                out.copy_(host, non_blocking=True)
            lane.stream.synchronize()
            return True
        finally:
            self._lanes.put(lane)
