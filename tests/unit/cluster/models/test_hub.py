"""Would catch terabytes fetched for nothing, a cache that is complete and refused, one that is not and accepted, and a
download that begins anew after a break. The hub is a server on loopback; its client is the real one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.file_server import FileServer, file_server

SHA = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
WANTED = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "model.safetensors.index.json", *SHARDS]  # fmt: skip
UNWANTED = ["consolidated.safetensors", "model.fp16.safetensors", "model.safetensors", "original/params.json",
            "original/consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "modeling_custom.py", "README.md",
            "onnx/model.onnx", "tokenizer.model"]  # fmt: skip


RESOLVE = """
import sys
from cluster.errors import ExpertMeshError
from cluster.models import resolve
try:
    print(resolve(sys.argv[1]))
except ExpertMeshError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub() -> Iterator[FileServer]:
    with file_server() as server:
        index = json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(SHARDS)}}).encode()
        tree = []
        for name in (*WANTED, *UNWANTED):
            body = (
                index
                if name.endswith("index.json")
                else json.dumps([name]).encode()
                if name.endswith("json")
                else name.encode() * 5000
            )
            oid = hashlib.sha1(body).hexdigest()
            tree.append({"type": "file", "path": name, "size": len(body), "oid": oid})
            server.add(f"/owner/name/resolve/{SHA}/{name}", body, ETag=f'"{oid}"', X_Repo_Commit=SHA)
        server.add("/api/models/owner/name/revision/main", {"id": "owner/name", "sha": SHA, "siblings": []})
        server.add(f"/api/models/owner/name/tree/{SHA}", tree)
        yield server


def resolve(hub: FileServer, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "TQDM_POSITION": "-1"}
    command = [sys.executable, "-c", RESOLVE, "owner/name"]
    return subprocess.run(command, env=clean | own | environ, capture_output=True, text=True, check=False, timeout=120)


def fetched(hub: FileServer) -> list[str]:
    prefix = f"/owner/name/resolve/{SHA}/"
    return [path.removeprefix(prefix) for path in hub.asked if path.startswith(prefix)]


def test_what_the_index_names_is_fetched_once_and_then_found_offline(hub: FileServer, tmp_path: Path) -> None:
    first = resolve(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert sorted(fetched(hub)) == sorted(WANTED)
    assert re.search(r"\dk?B / ", first.stderr), "progress counts files, not bytes"
    directory = Path(first.stdout.strip())
    assert all((directory / name).is_file() for name in WANTED)

    hub.asked.clear()
    assert resolve(hub, tmp_path, HF_HUB_OFFLINE="1").stdout.strip() == str(directory)
    # Fetched by another program, without what this one reads where it exists.
    (directory / "chat_template.jinja").unlink()
    assert resolve(hub, tmp_path, HF_HUB_OFFLINE="1").stdout.strip() == str(directory)
    (directory / SHARDS[1]).unlink()
    broken = resolve(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert broken.returncode == 1
    assert f"the hub cannot be reached, and {directory} lacks {SHARDS[1]}" in broken.stderr
    assert fetched(hub) == []


def test_a_break_costs_neither_what_came_before_nor_the_download(hub: FileServer, tmp_path: Path) -> None:
    hub.breaks.add(f"/owner/name/resolve/{SHA}/{SHARDS[0]}")
    result = resolve(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / SHARDS[0]).read_bytes() == SHARDS[0].encode() * 5000

    (Path(result.stdout.strip()) / SHARDS[1]).resolve().unlink()  # as if the process had been killed before it
    (Path(result.stdout.strip()) / SHARDS[1]).unlink()
    hub.asked.clear()
    assert resolve(hub, tmp_path).returncode == 0
    assert fetched(hub) == [SHARDS[1]]


def test_a_hub_that_cannot_be_reached_is_one_line(hub: FileServer, tmp_path: Path) -> None:
    hub.pages.clear()
    result = resolve(hub, tmp_path)
    assert result.returncode == 1
    assert (
        result.stderr.strip().splitlines()[-1].startswith("owner/name: cannot be fetched from the Hugging Face hub: ")
    )
    assert "Traceback" not in result.stderr


def test_a_model_is_put_into_a_directory_once(hub: FileServer, tmp_path: Path) -> None:
    """What pods do on a volume they share: a second one fetches nothing, another model is refused, half a one is
    completed."""
    dest = tmp_path / "volume" / "name"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "TQDM_POSITION": "-1"}

    def fetch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("expertmesh")), "model", "fetch", *arguments]
        return subprocess.run(command, env=clean | own, capture_output=True, text=True, check=False, timeout=120)

    first = fetch("owner/name", str(dest))
    assert first.returncode == 0, first.stderr
    assert all((dest / name).is_file() for name in WANTED) and sorted(fetched(hub)) == sorted(WANTED)
    hub.asked.clear()
    assert fetch("owner/name", str(dest)).returncode == 0 and hub.asked == []
    assert f"error: {dest} holds owner/name (None): name another directory" in fetch("owner/other", str(dest)).stderr
    (dest / ".expertmesh-complete").unlink()
    (dest / SHARDS[0]).unlink()
    assert fetch("owner/name", str(dest)).returncode == 0 and fetched(hub) == [SHARDS[0]]
    assert "neither `default` nor a hub id" in fetch("name", str(tmp_path / "x")).stderr
