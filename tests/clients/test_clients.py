"""Agent and extraction frameworks as they are, each by a script of its own, against the gateway.

Catches: a request that a framework sends and the gateway refuses, and an answer that it does not understand. The
frameworks are in an environment of their own: `make clients` makes it and runs this.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.gateway.tokenizer import Tokenizer
from tests.clients.scripted_model import ScriptedSession
from tests.unit.cluster.gateway.fake_gateway import Served, serve

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = os.environ["EXPERTMESH_CLIENTS"]


@pytest.fixture(scope="module")
def scripted(byte_level_path: Path) -> Iterator[Served]:
    session = ScriptedSession(Tokenizer(byte_level_path))
    with serve(byte_level_path, max_context=65536, session=session) as served:
        yield served


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*_client.py")), ids=lambda path: path.stem)
def test_python(scripted: Served, script: Path) -> None:
    run([f"{ENVIRONMENT}/bin/python", str(script), scripted.url], {})


def test_ai_sdk(scripted: Served) -> None:
    modules = f"{ENVIRONMENT}/node/node_modules"
    run(["node", str(SCRIPTS / "ai_sdk.mjs"), scripted.url], {"NODE_MODULES": modules})


def run(command: list[str], more: dict[str, str]) -> None:
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
