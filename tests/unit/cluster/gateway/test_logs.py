"""Would catch: a line that is no JSON, an event without its request's id, and a prompt, a token or a key in a log."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import RequestError
from cluster.observe import logs
from tests.unit.cluster.gateway.fake_gateway import serve

SECRETS = ("zebrafish", "sk-hidden", "Paris-42")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("debug", "json", "gateway-0")
    yield stream
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_every_event_is_a_line_with_its_request_and_shows_no_content(
    written: io.StringIO, byte_level_path: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-hidden-key\n")
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "zebrafish"}], "max_tokens": 4}
    with serve(byte_level_path, api_keys_file=keys) as served:

        def post(name: str, key: str = "sk-hidden-key", **more: Any) -> int:
            headers = {"authorization": f"Bearer {key}", "x-request-id": name}
            url = f"{served.url}/v1/chat/completions"
            return httpx.post(url, json=body | more, headers=headers, timeout=60).status_code

        assert post("mine-1") == 200
        assert post("mine-2", key="sk-hidden-but-wrong") == 401
        assert post("mine-3", temperature="zebrafish") == 400
        assert post("mine-4", **{"unknown-field": "zebrafish"}) == 200
        served.session.refusal = RequestError("this is full", code="queue_full", status=429)
        assert post("mine-5") == 429
        served.session.refusal = None
        served.session.failure = ValueError("cannot go on after Paris-42")  # type: ignore[assignment]
        assert post("mine-6", stream=True) == 200
        assert post("mine-7") == 500
    text = written.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    ours = [line for line in lines if line["logger"].startswith("cluster.")]
    assert not [line for line in ours if any(secret in json.dumps(line) for secret in SECRETS)]
    ended = {line["request_id"]: line["status"] for line in ours if "route" in line}
    assert ended == {
        "mine-1": 200, "mine-2": 401, "mine-3": 400, "mine-4": 200, "mine-5": 429, "mine-6": 200, "mine-7": 500,
    }  # fmt: skip
    assert all({"time", "level", "process", "logger", "event"} <= line.keys() for line in lines)
    (broken,) = [line for line in ours if line["event"] == "a stream broke off"]
    assert broken["request_id"] == "mine-6" and broken["error"] == "ValueError" and broken["stack"]
    assert all("request_id" in line for line in ours)
