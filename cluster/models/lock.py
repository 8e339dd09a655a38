"""A lock between processes that write the same model."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.models.upcycle import Progress


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the file lock `path`; the system frees it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process builds it, waiting", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
