"""What a newcomer does: build the packages, install one into an empty environment, and chat from an empty directory.

`python scripts/install_check.py [PYTHON] [wheel|sdist]`: PYTHON is the interpreter of the new environment, by default
the one that runs this; with everything it depends on, which takes minutes and gigabytes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
PORT = 18_473
_START_S = 300


def main() -> None:
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    kind = sys.argv[2] if len(sys.argv) > 2 else "wheel"
    with tempfile.TemporaryDirectory(prefix="expertmesh install ") as scratch:
        expertmesh = install(Path(scratch), python, kind)
        empty = Path(scratch, "empty")
        empty.mkdir()
        subprocess.run([expertmesh, "model", "random", str(Path(scratch, "tiny"))], cwd=empty, check=True)
        print(chat(expertmesh, Path(scratch, "tiny"), empty))


def install(scratch: Path, python: str, kind: str) -> Path:
    """The command, in an environment of its own that has this package and what it asks for."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(scratch), str(ROOT)], check=True)
    package = next(scratch.glob("*.whl" if kind == "wheel" else "*.tar.gz"))
    subprocess.run([python, "-m", "venv", str(scratch / "venv")], check=True)
    command = [str(scratch / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", str(package)]
    subprocess.run(command, check=True)
    return scratch / "venv" / "bin" / "expertmesh"


def chat(expertmesh: Path, model: Path, directory: Path) -> str:
    """One answer of a cluster that is started for it, and ended."""
    command = [str(expertmesh), "serve", str(model), "--port", str(PORT), "--kv-cache-mb", "16"]
    process = subprocess.Popen(command, cwd=directory)
    try:
        url = f"http://127.0.0.1:{PORT}"
        deadline = time.monotonic() + _START_S
        while not ready(f"{url}/ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the cluster did not start")
            time.sleep(0.2)
        body = {"model": model.name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
