"""Fixtures that every test may ask for."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is imported first; without a GPU its kernels are tested in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.cluster_fixture import cluster, tiny_checkpoint

__all__ = ["cluster", "tiny_checkpoint"]
