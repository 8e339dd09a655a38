"""Would catch an installation that brings too much, asks for what does not exist, or talks where it should not."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Stands for the Python of a new environment: knows no torch, and a pip that is as talkative as the real one.
PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *"import torch"*) exit 1 ;;
  *whl/cpu*) {cpu} ;;
  *"pip install"*) echo "WARNING: an index was ignored"; {rest} ;;
esac
"""


def make(directory: Path, *, cpu: str = "exit 0", rest: str = "exit 0") -> tuple[subprocess.CompletedProcess[str], str]:
    """`make` of an environment in `directory`, and what its Python was asked for."""
    python, log = directory / "bin" / "python", directory / "log"
    python.parent.mkdir()
    python.write_text(PYTHON.format(log=log, cpu=cpu, rest=rest))
    python.chmod(0o755)
    command = ["make", "--silent", f"VENV={directory}", f"{directory}/.runtime"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, log.read_text()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")


@needs_make
@pytest.mark.parametrize("cpu", ["exit 0", "exit 1"], ids=["index", "no index"])
def test_make_takes_the_small_torch_where_there_is_no_gpu_and_keeps_pip_quiet(cpu: str, tmp_path: Path) -> None:
    done, asked = make(tmp_path, cpu=cpu)
    assert done.returncode == 0
    assert done.stdout.startswith("Installing ExpertMesh") and len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    small = [line for line in asked.splitlines() if "--index-url https://download.pytorch.org/whl/cpu torch" in line]
    assert len(small) == (0 if list(Path("/dev").glob("nvidia[0-9]*")) else 1)
    assert asked.splitlines()[-1].endswith("-e .")


@needs_make
def test_what_pip_says_is_shown_when_it_fails(tmp_path: Path) -> None:
    done, _ = make(tmp_path, rest="echo 'ERROR: no space left on device'; exit 1")
    assert done.returncode != 0
    assert "ERROR: no space left on device" in done.stdout
    assert not (tmp_path / ".runtime").exists()


def test_every_extra_that_is_asked_for_exists() -> None:
    """pip warns of one that does not, and goes on without."""
    for requirement in map(Requirement, requires("expertmesh") or ()):
        try:
            known = metadata(requirement.name).get_all("Provides-Extra") or []
        except PackageNotFoundError:  # for another platform
            continue
        assert requirement.extras <= set(known), f"{requirement.name} has no such extra"
