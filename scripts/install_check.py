"""What a newcomer does: build the packages, install one into an empty environment, and chat from an empty directory.

`python scripts/install_check.py [PYTHON ...] [--kind wheel|sdist] [--quick]`: interpreters of the new environments, by
default one of each version from 3.11 to 3.13 that is at hand (on PATH, or pyenv's). The environments are uv's, so
without pip, and hold what the package asks for and nothing else: that is gigabytes, once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
KINDS = {"wheel": "*.whl", "sdist": "*.tar.gz"}
_START_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the packages into empty environments, and chat from each.")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters; by default those at hand")
    parser.add_argument("--kind", choices=KINDS, action="append", help="by default both")
    parser.add_argument("--quick", action="store_true", help="the sdist on the oldest, the wheel on the newest alone")
    options = parser.parse_args()
    pythons = options.pythons or list(at_hand())
    pairs = [(python, kind) for python in pythons for kind in options.kind or KINDS]
    if options.quick:
        pairs = [(pythons[0], "sdist"), (pythons[-1], "wheel")]
    with tempfile.TemporaryDirectory(prefix="expertmesh install ") as directory:
        scratch = Path(directory)
        build(scratch)
        for python, kind in pairs:
            began = time.monotonic()
            expertmesh = install(scratch / "venv", python, next(scratch.glob(KINDS[kind])))
            installed = time.monotonic()
            answer = chat(expertmesh, scratch)
            shutil.rmtree(scratch / "venv")
            print(
                f"{kind} on {python}: installed in {installed - began:.0f} s, answered {answer!r} "
                f"{time.monotonic() - installed:.0f} s later",
                flush=True,
            )


def build(into: Path) -> None:
    """A wheel and an sdist; what the builder says only if it fails."""
    command = [sys.executable, "-m", "build", "--outdir", str(into), str(ROOT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nthe packages could not be built")


def at_hand() -> Iterator[str]:
    """An interpreter of each version that this machine has."""
    for version in VERSIONS:
        pyenv = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")), reverse=True)
        found = [each for each in (shutil.which(f"python{version}"), *pyenv) if each and runs(each)]
        if found:
            yield found[0]
        else:
            print(f"Python {version} is not at hand", flush=True)


def runs(python: str) -> bool:
    """Whether it is an interpreter: pyenv has something of that name on PATH for versions that are not in use too."""
    return subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0


def install(venv: Path, python: str, package: Path) -> Path:
    """The command, in an environment of its own that has this package and what it asks for."""
    uv = str(Path(sys.executable).with_name("uv"))
    # uv does not read pip's settings. Links to its cache: a copy of torch for each environment is gigabytes.
    environ = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), "UV_LINK_MODE": "hardlink", **os.environ}
    subprocess.run([uv, "venv", "--quiet", "--python", python, str(venv)], check=True, env=environ)
    command = [uv, "pip", "install", "--quiet", "--python", str(venv / "bin" / "python"), str(package)]
    subprocess.run(command, check=True, env=environ)
    return venv / "bin" / "expertmesh"


def chat(expertmesh: Path, scratch: Path) -> str:
    """One answer of a cluster that is started for it in an empty directory, and ended."""
    empty, model = (Path(tempfile.mkdtemp(dir=scratch), name) for name in ("empty", "tiny"))
    empty.mkdir()
    subprocess.run([expertmesh, "model", "random", str(model)], cwd=empty, check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    options = ["--port", str(port), "--kv-cache-mb", "16"]
    process = subprocess.Popen([str(expertmesh), "serve", str(model), *options], cwd=empty, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_S
        while not ready(f"{url}/ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the cluster did not start")
            time.sleep(0.2)
        body = {"model": model.name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(f"{url}/page/app.js", timeout=60) as page:  # files that are no Python came along
            page.read()
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
