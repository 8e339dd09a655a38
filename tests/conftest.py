"""Fixtures that every test may ask for."""

from tests.cluster_fixture import cluster, tiny_checkpoint

__all__ = ["cluster", "tiny_checkpoint"]
