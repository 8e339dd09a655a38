"""Prometheus' own checks, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def need(program: str) -> str:
    """Its path. Without it a test is skipped on a user's machine and fails in CI."""
    found = shutil.which(program)
    if found is None:
        reason = f"{program} is not installed (apt install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def promtool(*arguments: str | Path) -> str:
    """What `promtool ARGUMENTS` says; it has to succeed."""
    done = subprocess.run([need("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
