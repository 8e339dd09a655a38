"""Catches: a packed body without bound, a name that should not lead here, a method or a slash that is refused."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import httpx
import pytest
import zstandard

from tests.unit.cluster.gateway.fake_gateway import Served, serve

BODY = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 2}).encode()
PACKED = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.ZstdCompressor().compress}


def post(served: Served, body: bytes, coding: str) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": coding}
    return httpx.post(f"{served.url}/v1/completions", content=body, headers=headers)


@pytest.mark.parametrize("coding", PACKED)
def test_packed_bodies(served: Served, coding: str) -> None:
    assert post(served, PACKED[coding](BODY), coding).status_code == 200
    assert post(served, b"no" + BODY, coding).status_code == 400
    bomb = PACKED[coding](b" " * 50_000_000)
    assert len(bomb) < 100_000 and post(served, bomb, coding).status_code == 413
    assert post(served, BODY, "br").status_code == 415


def test_a_body_in_several_members_is_read_whole_and_one_that_ends_early_is_refused(served: Served) -> None:
    for coding in ("gzip", "zstd"):
        assert post(served, PACKED[coding](BODY[:20]) + PACKED[coding](BODY[20:]), coding).status_code == 200
    for broken in (gzip.compress(BODY)[:-9], gzip.compress(BODY) + b"more", gzip.compress(b"") * 1000):
        assert post(served, broken, "gzip").json()["error"]["code"] == "invalid_encoding"


def test_head_and_slashes(served: Served) -> None:
    for path in ("/v1/models", "/v1/models/", "/health//", "/ping"):
        answer = httpx.head(served.url + path)
        assert (answer.status_code, answer.content) == (200, b"") and int(answer.headers["content-length"]) > 0
    assert httpx.post(f"{served.url}/v1/completions/", json=json.loads(BODY)).status_code == 200
    assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}


def test_a_body_where_none_is_taken_is_not_waited_for(served: Served) -> None:
    answer = httpx.request("GET", f"{served.url}/health", content=b"x" * 1000)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("a.localhost", 200), ("evil.example:80", 403)],
)
def test_a_gateway_without_keys_has_few_names(served: Served, host: str, status: int) -> None:
    assert httpx.get(f"{served.url}/v1/models", headers={"host": host}).status_code == status


def test_names_and_origins_can_be_allowed(byte_level_path: Path) -> None:
    options = {"allowed_hosts": "Mesh.example", "cors_origins": "https://a.example", "info_endpoints": True}
    with serve(byte_level_path, **options) as served:
        assert httpx.get(f"{served.url}/v1/models", headers={"host": "mesh.example"}).status_code == 200
        allowed = httpx.get(f"{served.url}/v1/models", headers={"origin": "https://a.example"}).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        asked = {"origin": "https://b.example", "access-control-request-method": "POST"}
        assert httpx.options(f"{served.url}/v1/completions", headers=asked).status_code == 400
        assert "im_start" in httpx.get(f"{served.url}/tokenizer_info").json()["chat_template"]
        assert httpx.get(f"{served.url}/server_info").json()["port"] == "8000"
