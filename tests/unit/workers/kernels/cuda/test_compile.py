"""Every GPU kernel compiles for every kind of card, without one, and takes no more shared memory than that has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_compiles(target: str) -> None:
    """In a process of its own: this one may have Triton's interpreter in it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.unit.workers.kernels.cuda.compile_all", target]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[5], check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
