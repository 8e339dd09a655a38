"""Behind a proxy, without `no_proxy`: would catch processes of one cluster that ask each other through it."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bench.gateway import connect
from tests.file_server import file_server

ROOT = Path(__file__).parents[3] / "cluster"
ASKS = {f"httpx.{name}" for name in ("AsyncClient", "Client", "request", "get", "post", "stream")} | {
    "urllib.request.urlopen"
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every HTTP request, or client, of the cluster; what fetches models goes out of it, and may need a proxy."""
    for path in ROOT.rglob("*.py"):
        if path.is_relative_to(ROOT / "models"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ASKS:
                yield f"{path.name}:{node.lineno}", node


def test_no_proxy_stands_between_processes_of_one_cluster() -> None:
    found = dict(calls())
    assert len(found) >= 5
    for place, call in found.items():
        asked_past_it = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("trust_env")
        assert asked_past_it == "False", f"{place}: {ast.unparse(call)}"


def test_a_gateway_is_found_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with file_server() as server:
        server.add("/v1/models", {"data": [{"id": "a-model"}]})
        assert asyncio.run(connect(server.url, None)).model == "a-model"
