"""Fixtures that every test may ask for."""

import gc
import os
from pathlib import Path

from hypothesis import settings

# Read when torch is imported. Idle threads of a test that wants several sleep soon, as those of a served model do.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is imported first; without a GPU its kernels are tested in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from tests.cluster_fixture import cluster, tiny_checkpoint

# Models of these sizes, and transformers beside a cluster, take most of their time waiting for a second thread. What
# concerns threads sets their number itself.
torch.set_num_threads(1)

# How long an example takes says more of what else the machine does than of what is tested.
settings.register_profile("expertmesh", deadline=None)
settings.load_profile("expertmesh")

__all__ = ["cluster", "tiny_checkpoint"]


def pytest_collection_finish() -> None:
    """What the modules and thousands of tests are made of stays: no collection has to look through it again."""
    gc.collect()
    gc.freeze()
