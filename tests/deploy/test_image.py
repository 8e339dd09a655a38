"""Would catch an image whose dependencies are not those of the project, are not pinned, or are incomplete; whose steps
fail; that carries what it must not, or runs as root. There is no Docker here: its steps run in a clean environment."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.rendering import CHART, ROOT, case

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
VARIANTS = ("cpu", "cuda")
_HASHES = r"((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^ ;\\]+)(?: ;[^\\]*)? \\\n" + _HASHES, re.M)


def _pins(variant: str) -> dict[str, str]:
    text = (ROOT / "deploy" / f"requirements-{variant}.txt").read_text()
    pins = {canonicalize_name(name): version for name, version, _ in _PIN.findall(text)}
    stated = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pins) == len(stated), "a requirement without a version or a hash"
    return pins


def _instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    found, stage = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append((stage, word, rest.strip()))
    return found


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lock_is_what_the_project_asks_for(variant: str) -> None:
    pins = _pins(variant)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        version = pins[canonicalize_name(wanted.name)].partition("+")[0]
        assert wanted.specifier.contains(version, prereleases=True), f"{text}, locked at {version}: make the lock anew"
    assert pins["ray"] == case("minimal").cluster["rayVersion"]
    assert (any(name.startswith("nvidia-cu") for name in pins), pins["torch"].endswith("+cpu")) == (
        (variant == "cuda"), (variant == "cpu")
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lock_is_whole(variant: str) -> None:
    """Of what is installed here: whatever a locked package needs is locked too, as `pip check` would say."""
    from importlib.metadata import PackageNotFoundError, requires

    pins = _pins(variant)
    for name in pins:
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue  # CUDA's
        for text in needs:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert canonicalize_name(wanted.name) in pins, f"{name} needs {text}"


def test_the_project_s_own_step_runs_in_a_clean_environment(tmp_path: Path) -> None:
    """The image's last build step, on what the image's build is sent, in an environment without anything."""
    source, venv = tmp_path / "src", tmp_path / "venv"
    for path in _context():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).symlink_to(ROOT / path)
    steps = [rest for stage, word, rest in _instructions() if (stage, word) == ("build", "RUN")]
    assert len(steps) == 2
    assert "--require-hashes" in steps[0] and "--no-deps" in steps[0]
    own = re.sub(r"&& \S*\"?/bin/pip\"? check|&& \"\$VENV/bin/pip\" check", "", steps[1])  # of what step 0 installs
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VENV": str(venv), "VARIANT": "cpu"}
    environ |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    result = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", own], cwd=source, env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    packages = next((venv / "lib").glob("python*/site-packages"))
    for file in ("cluster/fleet/pod_drain.py", "cluster/fleet/serve_deploy.py", "workers/kernels/cuda/__init__.py"):
        assert (packages / file).is_file()
    ours = [path.relative_to(ROOT) for folder in ("cluster", "workers") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in ours if not (packages / path).is_file()], "modules that the package leaves out"


def _context() -> list[Path]:
    """The files that are sent to the build: `git ls-files` through the ignore file."""
    lines = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split("\0")  # fmt: skip
    kept = []
    for name in filter(None, listed):
        ignored = False
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = Path(name).parts
            hit = name == pattern or name.startswith(f"{pattern}/") or pattern == "*" or (
                rule.startswith("**/") and any(fnmatch.fnmatch(part, pattern) for part in parts)
            )  # fmt: skip
            if hit:
                ignored = not rule.startswith("!")
        if not ignored and (ROOT / name).is_file():
            kept.append(Path(name))
    return kept


def test_only_what_the_image_is_made_of_is_sent() -> None:
    folders = {path.parts[0] for path in _context()}
    assert folders == {"pyproject.toml", "README.md", "LICENSE", "workers", "cluster", "deploy"}
    copied = [rest.split()[:-1] for stage, word, rest in _instructions() if (stage, word) == ("build", "COPY")]
    sources = {source.replace("${VARIANT}", "cpu").rstrip("/") for words in copied for source in words}
    sent = {str(path) for path in _context()}
    assert all(any(name == source or name.startswith(f"{source}/") for name in sent) for source in sources)


def test_the_image_is_what_the_chart_relies_on() -> None:
    run = {word: rest for stage, word, rest in _instructions() if stage == "runtime"}
    assert run["USER"] == "10001:0" and run["ENTRYPOINT"] == '["expertmesh"]' and "HEALTHCHECK" in run
    assert "org.opencontainers.image.licenses" in run["LABEL"]
    writable = {"/state", "/models", "/tmp"}
    for group, template in case("laptop").templates():
        container = template["spec"]["containers"][0]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert container["securityContext"]["readOnlyRootFilesystem"], group
        assert {"/state", "/tmp"} <= mounted <= writable | {"/dev/shm"}
        assert {variable["name"]: variable.get("value") for variable in container["env"]}["HOME"] == "/state"
    assert "appVersion: 0.1.0" in (CHART / "Chart.yaml").read_text()
