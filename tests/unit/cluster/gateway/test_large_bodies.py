"""Would catch: a large body taken in full before it is refused, and one that is read otherwise than a small one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.cluster.gateway.fake_gateway import Served

MB = 1 << 20
USER = {"role": "user", "content": "Hello"}
ODD: dict[str, Any] = {
    "messages": {"messages": [0] * MB},
    "empty messages": {"messages": [{}] * 400_000},
    "a long text": {"messages": [{"role": "user", "content": "é, " * MB}]},
    "ids": {"messages": [USER], "stop_token_ids": [1] * MB},
    "a schema": {"messages": [USER], "guided_json": {"enum": [0] * MB}},
    "keys": {"messages": [USER], "guided_json": {str(i): 0 for i in range(300_000)}},
    "tools": {"messages": [USER], "tools": [{"type": "function", "function": {"name": f"f{i}", "parameters": {
        "enum": [0] * 4000}}} for i in range(200)]},
    "documents": {"messages": [USER], "documents": [{"a": [0] * 1000}] * 1000},
    "unknown": {"messages": [USER], "what": [[0]] * (MB // 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_large_body_that_is_wrong_is_refused(roomy: Served, name: str) -> None:
    body = json.dumps({"model": "tiny"} | ODD[name], ensure_ascii=False).encode()
    assert len(body) < 8 * MB
    answer = httpx.post(f"{roomy.url}/v1/chat/completions", content=body, timeout=120,
                        headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["message"]


def test_a_large_body_that_is_right_is_served(roomy: Served) -> None:
    metadata = {"a": "x" * 300_000}
    answer = httpx.post(
        f"{roomy.url}/v1/chat/completions",
        json={"model": "tiny", "messages": [USER], "max_tokens": 2, "metadata": metadata},
    )
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    for bad in (b'{"a": ' + b"[" * 200_000, b'{"a": "' + b"x" * 200_000, b"\xff" * 200_000, b"[0]" + b" " * 200_000):
        answer = httpx.post(
            f"{roomy.url}/v1/chat/completions", content=bad, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json", answer.text
