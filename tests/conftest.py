"""Fixtures that every test may ask for."""

import os
from pathlib import Path

from hypothesis import settings

if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is imported first; without a GPU its kernels are tested in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.cluster_fixture import cluster, tiny_checkpoint

# How long an example takes says more of what else the machine does than of what is tested.
settings.register_profile("expertmesh", deadline=None)
settings.load_profile("expertmesh")

__all__ = ["cluster", "tiny_checkpoint"]
