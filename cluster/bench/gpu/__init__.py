"""`expertmesh bench gpu`: one GPU, its ceilings, and what we make of them."""

from cluster.bench.gpu.command import gpu

__all__ = ["gpu"]
