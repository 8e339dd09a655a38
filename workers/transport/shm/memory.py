"""Memory that one process writes and another of this host reads.

It has no name: the reader opens it through the descriptor of the process that made it, so nothing is left behind
whichever way either of them ends. It is sealed: nobody can shrink it under a process that reads it, and only its maker
can write to it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import weakref
from contextlib import suppress

import numpy as np

#: Of this way between two processes, in their handshake.
NAME = "shm"
#: Of the memory, as `/proc/PID/maps` shows it.
RING_NAME = "expertmesh-ring"
_NONCE_BYTES = 16
# Of linux/fcntl.h; Python names only the older ones. FUTURE_WRITE (Linux 5.1): no further writable mapping.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALS = 0x01 | 0x02 | 0x04 | 0x10  # SEAL, SHRINK, GROW, FUTURE_WRITE


class NotShared(OSError):
    """Memory cannot be shared with that process. The text says why."""


class OwnMemory:
    """Memory of this process that a peer may read. Pages exist from when they are first written to."""

    def __init__(self, n_bytes: int) -> None:
        """Raises NotShared where the system has no such memory."""
        try:
            file = os.memfd_create(RING_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError) as error:
            raise NotShared(f"this system makes no memory to share: {error}") from None
        self._close = weakref.finalize(self, os.close, file)
        try:
            os.ftruncate(file, n_bytes)
            self.map = mmap.mmap(file, n_bytes)
            fcntl.fcntl(file, _ADD_SEALS, _SEALS)
        except OSError as error:
            self.forget_file()
            raise NotShared(f"this system makes no memory to share: {error}") from None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self.map[:_NONCE_BYTES] = nonce
        #: What the peer needs to open it.
        self.name = f"{os.getpid()} {file} {nonce.hex()}"

    def forget_file(self) -> None:
        """The peer has opened it, or never will. The mapping stays."""
        self._close()


class PeerMemory:
    """Memory that another process made; it can only be read here."""

    def __init__(self, name: str, n_bytes: int) -> None:
        """`name` as the maker says it, `n_bytes` as agreed. Raises NotShared, above all when the peer is elsewhere."""
        file = -1
        try:
            pid, number, nonce = name.split()
            path = f"/proc/{int(pid)}/fd/{int(number)}"
            # Whatever else the peer may have open is not even opened.
            if not os.readlink(path).startswith(f"/memfd:{RING_NAME}"):
                raise NotShared(f"{path} is no ring")
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if fcntl.fcntl(file, _GET_SEALS) & _SEALS != _SEALS or os.fstat(file).st_size != n_bytes:
                raise NotShared(f"{path} is not sealed, or not of {n_bytes} bytes")
            self.map = mmap.mmap(file, n_bytes, prot=mmap.PROT_READ)
            if self.map[:_NONCE_BYTES].hex() != nonce:
                raise NotShared(f"{path} is another process's")
        except NotShared:
            raise
        except (OSError, ValueError) as error:
            raise NotShared(f"its memory cannot be opened from here: {error}") from None
        finally:
            with suppress(OSError):
                os.close(file)
        self.address = np.frombuffer(self.map, np.uint8).ctypes.data
