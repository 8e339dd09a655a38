"""promtool, which comes with Prometheus."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def check_metrics(text: str | bytes) -> str:
    """What promtool finds wrong with an exposition; empty where it is clean."""
    if shutil.which("promtool") is None:
        assert not os.environ.get("CI"), "continuous integration has to have promtool"
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt install prometheus)")
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(["promtool", "check", "metrics"], input=data, capture_output=True, timeout=60, check=False)
    return (done.stdout + done.stderr).decode()
