"""Catches processes that start late as they import what they do not use, and one that asks a node for what none has."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from cluster.config import Config
from cluster.errors import CheckpointError
from cluster.fleet import launcher as module
from cluster.fleet.launcher import EXPERT_RESOURCE, Kind, RayLauncher

WORKER = Kind(EXPERT_RESOURCE, 2.0, 0.5, 2, {})


@pytest.mark.parametrize(
    ("imported", "unused"),
    [
        ("cluster.control.controller, cluster.fleet.launcher", {"torch"}),
        ("cluster.fleet.expert_entry, cluster.fleet.router_actor", {"torch", "ray.serve", "fastapi", "tokenizers"}),
    ],
)
def test_who_starts_imports_only_what_it_uses(imported: str, unused: set[str]) -> None:
    code = f"import sys, {imported}; print(*({unused} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip(), "half a second of a core, on which others serve"


@pytest.mark.parametrize(
    ("nodes", "required", "bundle"),
    [
        ({"CPU": 2.0, EXPERT_RESOURCE: 4.0}, False, {"CPU": 2.0, "GPU": 0.5, EXPERT_RESOURCE: 1.0}),
        ({"CPU": 2.0}, False, {"CPU": 2.0, "GPU": 0.5}),
        ({"CPU": 2.0}, True, {"CPU": 2.0, "GPU": 0.5, EXPERT_RESOURCE: 1.0}),
    ],
)
def test_the_custom_resource_is_asked_for_where_a_node_has_it_or_always(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[str, float], required: bool, bundle: dict[str, float]
) -> None:
    monkeypatch.setattr(module, "ray", SimpleNamespace(cluster_resources=lambda: nodes))
    unused: Any = None
    launcher = RayLauncher(Config(require_node_roles=required), "", WORKER, WORKER, "", unused, unused)
    assert launcher._on_nodes(WORKER).bundle == bundle
    assert Kind("", 0.0, 0.0, 1, {}).bundle == {}, "no placement group then"


def test_why_a_process_did_not_start_is_a_sentence() -> None:
    """Would catch an operator who is shown Ray's stack in colours instead of the file that is missing."""
    unused: Any = None
    launcher = RayLauncher(Config(), "", unused, unused, "", unused, unused)
    raised = RayTaskError(
        "ready", "Traceback", CheckpointError("model.safetensors: no such file")
    ).as_instanceof_cause()
    assert isinstance(raised, CheckpointError)
    assert launcher.why(raised) == launcher.why(CheckpointError(str(raised.cause))) == "model.safetensors: no such file"
