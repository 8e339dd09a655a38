"""The tokenizer that the gateway's own tests use; nothing to collect without the frameworks."""

import os

from tests.unit.cluster.gateway.conftest import byte_level_path

__all__ = ["byte_level_path"]
collect_ignore = [] if "EXPERTMESH_CLIENTS" in os.environ else ["test_clients.py"]
