"""Catches a service for shared GPUs that outlives the cluster, or a start that fails because it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fleet.mps import Mps

CONTROL = """#!/bin/sh
if [ "$1" = -d ]; then echo "sees ${CUDA_VISIBLE_DEVICES-all}" > "$CUDA_MPS_PIPE_DIRECTORY/state"; exit %d; fi
read word; [ "$word" = quit ] && rm "$CUDA_MPS_PIPE_DIRECTORY/state"
"""


def installed(directory: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    control = directory / "nvidia-cuda-mps-control"
    control.write_text(CONTROL % status)
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_it_lives_as_long_as_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, status=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # it would call them 0 and 1, and its processes 2 and 3
    mps = Mps(tmp_path)
    assert mps.start() == ""
    state = Path(mps.variables["CUDA_MPS_PIPE_DIRECTORY"], "state")
    assert state.read_text() == "sees all\n"
    mps.stop()
    assert not state.exists()
    mps.stop()


def test_without_it_the_start_goes_on_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "is not installed" in Mps(tmp_path).start()
    installed(tmp_path, monkeypatch, status=1)
    assert "failed" in Mps(tmp_path).start()
